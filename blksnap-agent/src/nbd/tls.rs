//! TLS: certificates of a directory, laid out as those of qemu and nbdkit.
//!
//! | file | holds |
//! |---|---|
//! | `server-cert.pem` | the server's certificate, and those between it and the authority |
//! | `server-key.pem` | its private key: PKCS #8, PKCS #1 or SEC 1, not encrypted |
//! | `ca-cert.pem` | authorities that sign the certificates of clients |
//! | `ca-crl.pem` | certificates that were withdrawn; may be missing |
//!
//! A client must show a certificate that an authority of `ca-cert.pem` signed, unless the server is told to take
//! anybody. TLS 1.3 and 1.2 are spoken.
//!
//! Files that were renewed are read for the next client. If they can't be used, those from before stay in use.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};

const SERVER_CERT: &str = "server-cert.pem";
const SERVER_KEY: &str = "server-key.pem";
const CA_CERT: &str = "ca-cert.pem";
const CA_CRL: &str = "ca-crl.pem";
/// What is looked at to see whether something was renewed.
const FILES: [&str; 4] = [SERVER_CERT, SERVER_KEY, CA_CERT, CA_CRL];

/// The certificates can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file can't be read.
    #[error("use the TLS directory {}: read {file}: {source}", directory.display())]
    Read {
        /// The directory.
        directory: PathBuf,
        /// The file.
        file: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("use the TLS directory {}: {file} {reason}", directory.display())]
    Content {
        /// The directory.
        directory: PathBuf,
        /// The file.
        file: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Certificate and key don't fit, or are of a kind that is not understood.
    #[error("use the TLS directory {}: {source}", directory.display())]
    Unfit {
        /// The directory.
        directory: PathBuf,
        /// Why.
        source: rustls::Error,
    },
}

/// Who may connect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Clients {
    /// Those with a certificate of an authority in `ca-cert.pem`.
    #[default]
    Certified,
    /// Anybody: the connection is encrypted, and the client can check the server.
    Anybody,
}

type Times = [Option<SystemTime>; FILES.len()];

/// The server's side of TLS.
#[derive(Debug)]
pub struct ServerTls {
    directory: PathBuf,
    clients: Clients,
    now: Mutex<(Times, Arc<ServerConfig>)>,
}

impl ServerTls {
    /// Reads the certificates of `directory`.
    ///
    /// # Errors
    /// A file is missing or does not hold what it should; the error names it.
    pub fn load(directory: &Path, clients: Clients) -> Result<Self, TlsError> {
        let times = times(directory);
        let config = Arc::new(load(directory, clients)?);
        Ok(Self {
            directory: directory.to_owned(),
            clients,
            now: Mutex::new((times, config)),
        })
    }

    /// The directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Who may connect.
    #[must_use]
    pub const fn clients(&self) -> Clients {
        self.clients
    }

    /// The configuration for the next client, read again if a file was renewed. Reads files.
    pub(super) fn config(&self) -> Arc<ServerConfig> {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let times = times(&self.directory);
        if times != now.0 {
            // Whatever comes of it: not again before another change.
            now.0 = times;
            match load(&self.directory, self.clients) {
                Ok(config) => {
                    tracing::info!(directory = %self.directory.display(), "new certificates are in use");
                    now.1 = Arc::new(config);
                }
                Err(error) => tracing::warn!(%error, "the certificates from before stay in use"),
            }
        }
        Arc::clone(&now.1)
    }
}

fn times(directory: &Path) -> Times {
    FILES.map(|file| {
        fs::metadata(directory.join(file))
            .and_then(|metadata| metadata.modified())
            .ok()
    })
}

fn load(directory: &Path, clients: Clients) -> Result<ServerConfig, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let unfit = |source| TlsError::Unfit {
        directory: directory.to_owned(),
        source,
    };
    let content = |file, reason: String| TlsError::Content {
        directory: directory.to_owned(),
        file,
        reason,
    };
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(unfit)?;
    let builder = match clients {
        Clients::Anybody => builder.with_no_client_auth(),
        Clients::Certified => {
            let mut roots = RootCertStore::empty();
            for authority in certificates(directory, CA_CERT)? {
                roots
                    .add(authority)
                    .map_err(|error| content(CA_CERT, format!("holds no authority: {error}")))?;
            }
            let mut verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            if directory.join(CA_CRL).exists() {
                verifier = verifier
                    .with_crls(withdrawn(directory)?)
                    .allow_unknown_revocation_status();
            }
            let verifier = verifier.build().map_err(|error| match error {
                VerifierBuilderError::InvalidCrl(error) => content(CA_CRL, format!("is no list: {error:?}")),
                error => content(CA_CERT, format!("can't be used: {error}")),
            })?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let chain = certificates(directory, SERVER_CERT)?;
    let text = read(directory, SERVER_KEY)?;
    let key = PrivateKeyDer::from_pem_slice(&text)
        .map_err(|error| content(SERVER_KEY, format!("holds no private key: {error}")))?;
    builder.with_single_cert(chain, key).map_err(unfit)
}

fn read(directory: &Path, file: &'static str) -> Result<Vec<u8>, TlsError> {
    fs::read(directory.join(file)).map_err(|source| TlsError::Read {
        directory: directory.to_owned(),
        file,
        source,
    })
}

fn certificates(directory: &Path, file: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(directory, file)?;
    let found = CertificateDer::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>();
    checked(directory, file, "certificate", found)
}

fn withdrawn(directory: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let text = read(directory, CA_CRL)?;
    let found = CertificateRevocationListDer::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>();
    checked(directory, CA_CRL, "list of withdrawn certificates", found)
}

fn checked<T>(
    directory: &Path,
    file: &'static str,
    what: &str,
    found: Result<Vec<T>, pem::Error>,
) -> Result<Vec<T>, TlsError> {
    let reason = match found {
        Ok(found) if found.is_empty() => format!("holds no {what}"),
        Ok(found) => return Ok(found),
        Err(error) => format!("is no PEM: {error}"),
    };
    Err(TlsError::Content {
        directory: directory.to_owned(),
        file,
        reason,
    })
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

    use super::*;

    /// Writes an authority, and a server's certificate of it.
    fn issue(directory: &Path) {
        let mut authority = CertificateParams::new(Vec::new()).unwrap();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        fs::write(
            directory.join(CA_CERT),
            authority.self_signed(&key).unwrap().pem(),
        )
        .unwrap();
        let issuer = Issuer::new(authority, key);
        let key = KeyPair::generate().unwrap();
        let server = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let server = server.signed_by(&key, &issuer).unwrap();
        fs::write(directory.join(SERVER_CERT), server.pem()).unwrap();
        fs::write(directory.join(SERVER_KEY), key.serialize_pem()).unwrap();
    }

    #[test]
    fn what_is_wrong_is_named_by_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let complaint = |clients| ServerTls::load(path, clients).unwrap_err().to_string();
        assert!(complaint(Clients::Certified).contains("read ca-cert.pem: No such file"));
        assert!(complaint(Clients::Anybody).contains("read server-cert.pem: No such file"));
        issue(path);
        ServerTls::load(path, Clients::Certified).unwrap();
        for (file, text, clients, reason) in [
            (
                CA_CERT,
                "",
                Clients::Certified,
                "ca-cert.pem holds no certificate",
            ),
            (
                SERVER_CERT,
                "-----BEGIN CERTIFICATE-----\n",
                Clients::Anybody,
                "server-cert.pem is no PEM",
            ),
            (
                SERVER_KEY,
                "x",
                Clients::Anybody,
                "server-key.pem holds no private key",
            ),
            (CA_CRL, "x", Clients::Certified, "ca-crl.pem holds no list"),
        ] {
            let before = fs::read(path.join(file)).ok();
            fs::write(path.join(file), text).unwrap();
            let complaint = complaint(clients);
            assert!(complaint.contains(reason), "{complaint}");
            match before {
                Some(before) => fs::write(path.join(file), before).unwrap(),
                None => fs::remove_file(path.join(file)).unwrap(),
            }
        }
        // Without client certificates the authority is not needed.
        fs::remove_file(path.join(CA_CERT)).unwrap();
        ServerTls::load(path, Clients::Anybody).unwrap();
        // A key of another certificate.
        fs::write(
            path.join(SERVER_KEY),
            KeyPair::generate().unwrap().serialize_pem(),
        )
        .unwrap();
        let error = ServerTls::load(path, Clients::Anybody).unwrap_err();
        assert!(matches!(error, TlsError::Unfit { .. }), "{error}");
    }

    #[test]
    fn renewed_certificates_are_taken_and_broken_ones_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        issue(path);
        let tls = ServerTls::load(path, Clients::Certified).unwrap();
        let first = tls.config();
        assert!(Arc::ptr_eq(&first, &tls.config()));
        let touch = |seconds| {
            let time = SystemTime::now() + std::time::Duration::from_secs(seconds);
            fs::File::open(path.join(SERVER_KEY))
                .unwrap()
                .set_modified(time)
                .unwrap();
        };
        issue(path);
        touch(10);
        let second = tls.config();
        assert!(!Arc::ptr_eq(&first, &second));
        fs::write(path.join(SERVER_CERT), "broken").unwrap();
        touch(20);
        assert!(Arc::ptr_eq(&second, &tls.config()));
        issue(path);
        touch(30);
        assert!(!Arc::ptr_eq(&second, &tls.config()));
    }
}
