//! Makes cargo rebuild the program after the page was built, because the program embeds `web/dist`.

fn main() {
    // If a watched path does not exist, cargo runs this script on every build.
    let dist = std::path::Path::new("web/dist");
    println!("cargo:rerun-if-changed={}", if dist.is_dir() { "web/dist" } else { "web" });
}
