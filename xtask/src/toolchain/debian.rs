//! Debian: downloads the package rust-src of a given Rust release without touching the system.
//!
//! The machine's own suites rarely have the release that rustup installed; the same mirror's backports do.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::apt::{self, Place, Private};

/// Suites of Debian's mirrors that carry new Rust releases, tried before the machine's own ones.
const DEBIAN_SUITES: [&str; 4] = ["trixie-backports", "stable-backports", "testing", "unstable"];

/// Downloads the package for Rust `release` into `folder`.
pub(super) fn download(release: &str, folder: &Path) -> Result<PathBuf> {
    let places = places(&apt::configured()?);
    ensure!(
        !places.is_empty(),
        "apt has no mirror of Debian or Ubuntu configured"
    );
    let mut refusals = Vec::new();
    for place in &places {
        match Private::new(folder, place).and_then(|apt| fetch(&apt, release)) {
            Ok(package) => return Ok(package),
            Err(error) => refusals.push(format!("{}: {error:#}", place.suite)),
        }
    }
    bail!("no mirror has rust-src {release} ({})", refusals.join("; "));
}

/// Where to look: on Debian's mirrors the suites with new releases first.
fn places(mirrors: &[Place]) -> Vec<Place> {
    let mut places = Vec::new();
    for mirror in mirrors {
        if mirror.distribution == "debian" {
            for suite in DEBIAN_SUITES {
                let place = Place {
                    suite: suite.to_owned(),
                    ..mirror.clone()
                };
                if !places.contains(&place) {
                    places.push(place);
                }
            }
        }
    }
    for mirror in mirrors {
        if !places.contains(mirror) {
            places.push(mirror.clone());
        }
    }
    places
}

/// Reads the index of the suite, and downloads the package if it is there.
fn fetch(apt: &Private, release: &str) -> Result<PathBuf> {
    apt.update()?;
    let versioned = match release.rsplit_once('.') {
        Some((minor, _)) => format!("rust-{minor}-src"),
        None => release.to_owned(),
    };
    let listed = apt.cache(&["madison", "rust-src", &versioned])?;
    let (name, version) =
        choose(&listed, release).with_context(|| format!("it has {}", versions(&listed)))?;
    apt.download(&format!("{name}={version}"))
}

/// The name and version of the first package of `release` that `apt-cache madison` listed.
fn choose(listed: &str, release: &str) -> Option<(String, String)> {
    listed.lines().find_map(|line| {
        let mut fields = line.split('|').map(str::trim);
        let (name, version) = (fields.next()?, fields.next()?);
        let without_epoch = version.split_once(':').map_or(version, |(_, rest)| rest);
        let upstream = without_epoch.split(['+', '-', '~']).next()?;
        (upstream == release).then(|| (name.to_owned(), version.to_owned()))
    })
}

/// What was listed, for the error.
fn versions(listed: &str) -> String {
    let versions: Vec<&str> = listed
        .lines()
        .filter_map(|line| line.split('|').nth(1))
        .map(str::trim)
        .collect();
    if versions.is_empty() {
        "no rust-src".to_owned()
    } else {
        versions.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTED: &str =
        "  rust-src | 1.96.1+dfsg1-2~bpo13+1 | mirror a\n  rust-src | 1.95.0+dfsg1-2~bpo13+1 | mirror a\n";

    #[test]
    fn the_version_must_be_the_compilers_own() {
        let (name, version) = choose(LISTED, "1.95.0").unwrap();
        assert_eq!(
            (name.as_str(), version.as_str()),
            ("rust-src", "1.95.0+dfsg1-2~bpo13+1")
        );
        assert_eq!(choose(LISTED, "1.95.1"), None);
        assert_eq!(choose(LISTED, "1.9"), None);
        assert_eq!(
            choose("rust-src | 2:1.95.0-1 | x", "1.95.0").unwrap().1,
            "2:1.95.0-1"
        );
        assert_eq!(versions(LISTED), "1.96.1+dfsg1-2~bpo13+1, 1.95.0+dfsg1-2~bpo13+1");
    }

    fn places_in(targets: &str) -> Vec<Place> {
        places(&apt::places(targets))
    }

    #[test]
    fn debian_mirrors_are_asked_for_backports_before_their_own_suites() {
        let places = places_in(
            "DEP-11 http://mirror.example/debian/ bookworm\nPackages http://mirror.example/debian/ bookworm\n\
             Packages http://mirror.example/debian/ bookworm-updates\n\
             Packages http://mirror.example/debian-security/ bookworm-security\n\
             Packages https://other.example/tools node\n",
        );
        let suites: Vec<&str> = places.iter().map(|place| place.suite.as_str()).collect();
        let expected = [
            "trixie-backports",
            "stable-backports",
            "testing",
            "unstable",
            "bookworm",
            "bookworm-updates",
        ];
        assert_eq!(suites, expected);
        assert!(
            places
                .iter()
                .all(|place| place.uri == "http://mirror.example/debian/")
        );
    }

    #[test]
    fn ubuntu_has_only_its_own_suites() {
        let places = places_in(
            "Packages http://mirror.example/ubuntu/ noble\nPackages http://mirror.example/ubuntu noble-updates\n",
        );
        assert_eq!(places.len(), 2);
        assert!(places.iter().all(|place| place.distribution == "ubuntu"));
    }
}
