//! Redacts URLs for logs and errors, and detects parts of a definition that look like secrets. Pure.

use std::borrow::Cow;

/// Names of parameters and headers that contain credentials, in lower case and without `-` and `_`.
const SECRET_NAMES: [&str; 21] = [
    "accesskey",
    "apikey",
    "appid",
    "appkey",
    "auth",
    "authkey",
    "authorization",
    "bearer",
    "cookie",
    "credential",
    "credentials",
    "jwt",
    "key",
    "passwd",
    "password",
    "privatekey",
    "proxyauthorization",
    "pwd",
    "sessionid",
    "sig",
    "subscriptionkey",
];
/// Suffixes of such names, as in `access_token`.
const SECRET_SUFFIXES: [&str; 5] = ["apikey", "password", "secret", "signature", "token"];

/// Removes the user, the password, the fragment and the values of the query parameters from a URL. The text need not be
/// a valid URL.
pub fn redacted(url: &str) -> String {
    let url = url.split('#').next().unwrap_or_default();
    let (base, query) = url.split_once('?').map_or((url, None), |(base, query)| (base, Some(query)));
    let mut shown = match base.split_once("//") {
        None => base.to_owned(),
        Some((scheme, rest)) => {
            let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            format!("{scheme}//{}{path}", authority.rsplit('@').next().unwrap_or_default())
        }
    };
    if let Some(query) = query {
        let names = query.split('&').map(|pair| match pair.split_once('=') {
            Some((name, _)) => format!("{name}=…"),
            None => "…".to_owned(),
        });
        shown.push('?');
        shown.push_str(&names.collect::<Vec<_>>().join("&"));
    }
    shown
}

/// Whether a URL contains a user or a password.
pub(super) fn has_user(url: &str) -> bool {
    let authority = url.split_once("//").map_or(url, |(_, rest)| rest).split(['/', '?', '#']).next();
    authority.is_some_and(|authority| authority.contains('@'))
}

/// The names of the parameters of a URL template that look like credentials and whose value contains literal text.
pub(super) fn secret_parameters(template: &str) -> Vec<String> {
    let query = template.split('#').next().and_then(|url| url.split_once('?')).map_or("", |(_, query)| query);
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let secrets = pairs.filter(|(name, value)| looks_secret(&decoded(name)) && has_literal(value));
    secrets.map(|(name, _)| decoded(name).into_owned()).collect()
}

/// Whether a parameter or header with this name contains credentials.
pub fn looks_secret(name: &str) -> bool {
    let plain: String = name.to_lowercase().chars().filter(char::is_ascii_alphanumeric).collect();
    let plain = plain.strip_prefix('x').filter(|rest| rest.len() > 2).unwrap_or(&plain);
    SECRET_NAMES.contains(&plain) || SECRET_SUFFIXES.iter().any(|suffix| plain.ends_with(suffix))
}

fn decoded(name: &str) -> Cow<'_, str> {
    let mut pairs = url::form_urlencoded::parse(name.as_bytes());
    pairs.next().map_or(Cow::Borrowed(name), |(name, _)| name)
}

/// Whether a value contains text outside of placeholders.
pub(super) fn has_literal(value: &str) -> bool {
    let mut rest = value;
    while let Some((before, after)) = rest.split_once('{') {
        if !before.is_empty() {
            return true;
        }
        rest = after.split_once('}').map_or("", |(_, rest)| rest);
    }
    !rest.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redacted_url_has_no_user_no_values_and_no_fragment() {
        let check = |url: &str, expected: &str| assert_eq!(redacted(url), expected, "{url}");
        check("https://h:8080/v1/items", "https://h:8080/v1/items");
        check("https://ada:s3cret@h/v1?a=1&key=s3cret", "https://h/v1?a=…&key=…");
        check("http://a@b@h?s3cret#s3cret", "http://h?…");
        check("//a:b@h/x", "//h/x");
        check("/v1?cursor=s3cret", "/v1?cursor=…");
        check("https://h/a@b", "https://h/a@b");
        check("no url", "no url");
    }

    #[test]
    fn literal_values_of_credential_parameters_are_secrets() {
        let check = |query: &str, expected: &[&str]| {
            assert_eq!(secret_parameters(&format!("https://h/x?{query}")), expected, "{query}");
        };
        check("from={interval.start}&api_key=S&limit=10", &["api_key"]);
        check(
            "API-Key=S&access_token=T&X-Amz-Signature=U&appid=V",
            &["API-Key", "access_token", "X-Amz-Signature", "appid"],
        );
        check("page_token={cursor}&key=", &[]);
        check("page_token=a{cursor}", &["page_token"]);
        check("sort=created&key%5B%5D=S&expand=keys", &["key[]"]);
        check("monkey=1&sort_by=key&tokens=5", &[]);
    }

    #[test]
    fn a_user_is_only_detected_in_the_authority() {
        for (url, expected) in [
            ("https://a:b@h/", true),
            ("https://a@h", true),
            ("https://h/a@b", false),
            ("https://h?to=a@b", false),
        ] {
            assert_eq!(has_user(url), expected, "{url}");
        }
    }
}
