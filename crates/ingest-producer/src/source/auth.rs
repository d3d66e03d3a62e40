//! Credentials of a source: reads secrets, requests access tokens, and renews both when the source rejects them.

use super::client::ClientError;
use crate::error::AttemptError;
use common::contracts::stream::{Auth, Secret, TokenRequest};
use common::runtime::config::{ConfigError, read_secret, read_secret_variable};
use reqwest::header::{self, HeaderName, HeaderValue};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;
use url::{Url, form_urlencoded};

/// How long before its expiry an access token is renewed.
const EXPIRY_MARGIN: Duration = Duration::from_secs(60);

/// What a request is authenticated with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// Nothing.
    None,
    /// HTTP basic authentication.
    Basic {
        /// User name.
        user: String,
        /// Password.
        password: String,
    },
    /// A header.
    Header(HeaderName, HeaderValue),
    /// A query parameter.
    Query(String, String),
}

/// Credentials with the secrets that they contain.
#[derive(Debug, PartialEq, Eq)]
pub struct Loaded {
    /// What a request is authenticated with.
    pub credentials: Credentials,
    secrets: Vec<String>,
    expires: Option<Instant>,
}

impl Loaded {
    /// No credentials.
    pub fn nothing() -> Loaded {
        Loaded { credentials: Credentials::None, secrets: vec![], expires: None }
    }

    /// Replaces each secret in a text from the source, which may repeat what it received.
    pub fn redacted(&self, text: &str) -> String {
        let encoded =
            |secret: &String| form_urlencoded::byte_serialize(secret.as_bytes()).collect::<String>();
        self.secrets.iter().fold(text.to_owned(), |text, secret| {
            text.replace(secret.as_str(), "…").replace(&encoded(secret), "…")
        })
    }

    fn is_expired(&self) -> bool {
        self.expires.is_some_and(|expires| Instant::now() >= expires)
    }
}

/// Sends the request for an access token and returns the response.
pub trait SendTokenRequest {
    /// Posts a body of this content type. Errors do not contain the body.
    fn send(
        &self,
        url: Url,
        body: String,
        content_type: &'static str,
    ) -> impl Future<Output = Result<Value, AttemptError>> + Send;
}

/// Provides the credentials of one source.
#[derive(Debug)]
pub struct Authenticator {
    auth: Auth,
    /// The current credentials; `None` before the first token request.
    current: Mutex<Option<Arc<Loaded>>>,
}

impl Authenticator {
    /// Reads the secrets, so that a missing one is noticed at the start.
    pub fn new(auth: &Auth) -> Result<Authenticator, ClientError> {
        let current = match auth {
            Auth::Token(request) => {
                for (_, secret) in &request.secrets {
                    read(secret)?;
                }
                None
            }
            other => Some(Arc::new(load(other)?)),
        };
        Ok(Authenticator { auth: auth.clone(), current: Mutex::new(current) })
    }

    /// Whether requests are authenticated.
    pub fn has_secrets(&self) -> bool {
        self.auth != Auth::None
    }

    /// The current credentials.
    pub async fn credentials(&self, sender: &impl SendTokenRequest) -> Result<Arc<Loaded>, AttemptError> {
        let mut current = self.current.lock().await;
        match current.as_ref().filter(|loaded| !loaded.is_expired()) {
            Some(loaded) => Ok(loaded.clone()),
            None => self.renew(&mut current, sender).await,
        }
    }

    /// Other credentials than those that the source rejected, or `None` if there are none.
    pub async fn after_rejection(
        &self,
        rejected: &Arc<Loaded>,
        sender: &impl SendTokenRequest,
    ) -> Result<Option<Arc<Loaded>>, AttemptError> {
        let mut current = self.current.lock().await;
        let replaced = current.as_ref().filter(|loaded| !Arc::ptr_eq(loaded, rejected)).cloned();
        let loaded = match replaced {
            // Another request has renewed them in the meantime.
            Some(loaded) => loaded,
            None => self.renew(&mut current, sender).await?,
        };
        Ok((loaded.credentials != rejected.credentials).then_some(loaded))
    }

    async fn renew(
        &self,
        current: &mut Option<Arc<Loaded>>,
        sender: &impl SendTokenRequest,
    ) -> Result<Arc<Loaded>, AttemptError> {
        let loaded = match &self.auth {
            Auth::Token(request) => token(request, sender).await?,
            other => load(other).map_err(|e| AttemptError::retryable(e.to_string()))?,
        };
        let loaded = Arc::new(loaded);
        *current = Some(loaded.clone());
        Ok(loaded)
    }
}

fn read(secret: &Secret) -> Result<String, ConfigError> {
    match secret {
        Secret::File(file) => read_secret(Path::new(file)),
        Secret::Env(variable) => read_secret_variable(variable),
    }
}

fn load(auth: &Auth) -> Result<Loaded, ClientError> {
    let (credentials, secret) = match auth {
        Auth::None | Auth::Token(_) => (Credentials::None, None),
        Auth::Bearer { token } => {
            let token = read(token)?;
            (sensitive_header("authorization", &format!("Bearer {token}"))?, Some(token))
        }
        Auth::Basic { user, password } => {
            let password = read(password)?;
            (Credentials::Basic { user: user.clone(), password: password.clone() }, Some(password))
        }
        Auth::ApiKey { header, key } => {
            let key = read(key)?;
            (sensitive_header(header, &key)?, Some(key))
        }
        Auth::ApiKeyInQuery { query, key } => {
            let key = read(key)?;
            (Credentials::Query(query.clone(), key.clone()), Some(key))
        }
    };
    Ok(Loaded { credentials, secrets: secret.into_iter().collect(), expires: None })
}

fn sensitive_header(name: &str, value: &str) -> Result<Credentials, ClientError> {
    let wrong = || ClientError::Header(name.to_owned());
    let key = HeaderName::from_bytes(name.as_bytes()).map_err(|_| wrong())?;
    let mut value = HeaderValue::from_str(value).map_err(|_| wrong())?;
    value.set_sensitive(true);
    Ok(Credentials::Header(key, value))
}

/// Requests an access token.
async fn token(request: &TokenRequest, sender: &impl SendTokenRequest) -> Result<Loaded, AttemptError> {
    let fatal = |e: &dyn std::fmt::Display| AttemptError::fatal(format!("source.auth: {e}"));
    let mut secrets = Vec::new();
    let mut fields = request.fields.clone();
    for (name, secret) in &request.secrets {
        let secret = read(secret).map_err(|e| AttemptError::retryable(e.to_string()))?;
        secrets.push(secret.clone());
        fields.push((name.clone(), secret));
    }
    let url = Url::parse(&request.url).map_err(|e| fatal(&e))?;
    let (body, content_type) = if request.json {
        let members = fields.into_iter().map(|(name, value)| (name, Value::from(value))).collect();
        (Value::Object(members).to_string(), "application/json")
    } else {
        let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(fields).finish();
        (body, "application/x-www-form-urlencoded")
    };
    let requested = Loaded { credentials: Credentials::None, secrets: secrets.clone(), expires: None };
    let response = sender.send(url, body, content_type).await.map_err(|mut error| {
        error.cause = requested.redacted(&format!("the request for an access token failed: {}", error.cause));
        error
    })?;
    let token = response.pointer(&request.token).and_then(Value::as_str).ok_or_else(|| {
        AttemptError::retryable(format!("source.auth: the response has no token at `{}`", request.token))
    })?;
    secrets.push(token.to_owned());
    let credentials = match &request.header {
        Some(name) => sensitive_header(name, token),
        None => sensitive_header(header::AUTHORIZATION.as_str(), &format!("Bearer {token}")),
    };
    let lifetime = response.get("expires_in").and_then(Value::as_u64).map(Duration::from_secs);
    // A token that lives shorter than the margin is used until the source rejects it.
    let expires =
        lifetime.and_then(|lifetime| lifetime.checked_sub(EXPIRY_MARGIN)).map(|left| Instant::now() + left);
    Ok(Loaded { credentials: credentials.map_err(|e| fatal(&e))?, secrets, expires })
}
