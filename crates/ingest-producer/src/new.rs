//! `source new`: fetches one page of an unknown API as a run would, and prints or writes the definition that
//! [`draft`](crate::draft) derives from it.

use crate::CommandOutput;
use crate::config::NewArgs;
use crate::draft::{Answer, draft};
use crate::source::client::{FetchPage, SourceClient};
use crate::source::request::PageRequest;
use anyhow::{Context, bail};
use common::contracts::stream::{BodyFormat, Definition, redacted};
use std::io::Write;
use url::Url;

/// The smallest definition. Its `[source]` provides the limits of the request.
const LEAST: &str = r#"
stream = { name = "new", schedule = { every = "1m" } }
source = { url = "https://localhost/" }
event = { type = "new" }
column = [{ name = "value", type = "text" }]
"#;

/// Fetches the page and drafts its definition.
pub async fn new(args: &NewArgs, now_ms: i64) -> anyhow::Result<CommandOutput> {
    let shown = redacted(&args.url);
    if args.url.contains(['{', '}']) {
        bail!("{shown}: give the URL with real values instead of placeholders; they are put in afterwards");
    }
    let url = Url::parse(&args.url).with_context(|| format!("{shown} is not a URL"))?;
    if !url.username().is_empty() || url.password().is_some() {
        bail!("{shown}: give user and password as --header 'Authorization: Basic …' instead of in the URL");
    }
    let mut source = Definition::parse("source new", LEAST)?.source;
    source.allow_private = args.allow_private;
    source.headers.clone_from(&args.header);
    // This format accepts any text; the draft determines the real one.
    source.format = BodyFormat::Ndjson;
    let client = SourceClient::new(&source)?;
    let page = client.fetch(&PageRequest { post: false, url, body: None }).await.map_err(|e| {
        let hint = match e.http_status {
            Some(401 | 403) => "; give a key with --header 'NAME: VALUE' or in the query of the URL",
            None if e.cause.contains("private address") => "; allow it with --allow-private",
            _ => "",
        };
        anyhow::anyhow!("{shown}: {e}{hint}")
    })?;
    let answer = Answer {
        name: args.name.as_deref(),
        url: &args.url,
        request_headers: &args.header,
        allow_private: args.allow_private,
        text: &page.text,
        headers: &page.headers,
        now_ms,
    };
    let text = draft(&answer).with_context(|| shown.clone())?;
    let Some(file) = &args.output else { return Ok(CommandOutput::text(text)) };
    let name = file.display();
    let created = std::fs::File::options().write(true).create_new(true).open(file);
    let mut created =
        created.with_context(|| format!("cannot create {name}; existing files are not overwritten"))?;
    created.write_all(text.as_bytes()).with_context(|| format!("cannot write {name}"))?;
    Ok(CommandOutput::text(format!(
        "wrote {name}. Read its comments, then:\n  \
         ingest-producer source check --stream {name}\n  \
         PIPELINE_STREAM={name} ./run"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use wiremock::matchers::{header, path};
    use wiremock::{Mock, MockServer, ResponseTemplate};

    fn args(url: String) -> NewArgs {
        NewArgs { url, name: None, header: vec![], allow_private: true, output: None }
    }

    async fn server() -> MockServer {
        let server = MockServer::start().await;
        let page = ResponseTemplate::new(200).set_body_string(r#"{"items": [{"id": 1}]}"#);
        Mock::given(path("/items")).and(header("x-key", "k")).respond_with(page).mount(&server).await;
        let html = ResponseTemplate::new(200).set_body_string("<html>");
        Mock::given(path("/html")).respond_with(html).mount(&server).await;
        Mock::given(path("/secret")).respond_with(ResponseTemplate::new(403)).mount(&server).await;
        server
    }

    #[tokio::test]
    async fn a_page_becomes_a_file_that_is_not_overwritten() {
        let server = server().await;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("mine.toml");
        let header = vec![("X-Key".to_owned(), "k".to_owned())];
        let args = NewArgs { header, output: Some(file.clone()), ..args(format!("{}/items", server.uri())) };
        let output = new(&args, 0).await.unwrap();
        assert!(output.text.contains("source check --stream"), "{}", output.text);
        let text = std::fs::read_to_string(&file).unwrap();
        assert_eq!(Definition::parse("new", &text).unwrap().source.records, "/items");
        let error = format!("{:#}", new(&args, 0).await.unwrap_err());
        assert!(error.contains("existing files are not overwritten"), "{error}");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), text);
    }

    #[tokio::test]
    async fn an_error_says_what_to_do() {
        let server = server().await;
        let check = async |args: NewArgs, expected: &str| {
            let error = format!("{:#}", new(&args, 0).await.unwrap_err());
            assert!(error.contains(expected), "`{expected}` is not in {error}");
        };
        let uri = server.uri();
        check(args(format!("{uri}/secret")), "403 Forbidden; give a key with --header").await;
        check(args(format!("{uri}/nowhere")), "404 Not Found").await;
        check(args(format!("{uri}/html")), "neither JSON, NDJSON nor CSV").await;
        check(NewArgs { allow_private: false, ..args(format!("{uri}/items")) }, "--allow-private").await;
        check(args("http://h/x?page={page}".to_owned()), "real values instead of placeholders").await;
        check(args("http://a:b@h/x".to_owned()), "--header 'Authorization: Basic").await;
        check(args("items".to_owned()), "is not a URL").await;
        check(args("http://127.0.0.1:1/x".to_owned()), "the source cannot be read").await;
    }
}
