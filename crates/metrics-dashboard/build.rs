//! Tells cargo to look at the page again when it was built: the program embeds `web/dist`.

fn main() {
    // Watching a folder that is not there would run this each time.
    let dist = std::path::Path::new("web/dist");
    println!("cargo:rerun-if-changed={}", if dist.is_dir() { "web/dist" } else { "web" });
}
