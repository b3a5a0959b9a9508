//! Debian: downloads the package rust-src of a given Rust release without touching the system.
//!
//! apt runs with sources, lists and cache of its own in a temporary folder, but with the machine's mirrors,
//! proxies and keys. So apt itself checks the signature of the release file, the sum of the package index in it,
//! and the sum of the package in that, before it hands the file out. The machine's own suites rarely have the
//! release that rustup installed; the same mirror's backports do.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// Suites of Debian's mirrors that carry new Rust releases, tried before the machine's own ones.
const DEBIAN_SUITES: [&str; 4] = ["trixie-backports", "stable-backports", "testing", "unstable"];

/// Key rings of the distributions, where the release files' keys are if they are not in apt's own folder.
const KEY_RINGS: [(&str, &[&str]); 2] = [
    (
        "debian",
        &[
            "/usr/share/keyrings/debian-archive-keyring.pgp",
            "/usr/share/keyrings/debian-archive-keyring.gpg",
        ],
    ),
    ("ubuntu", &["/usr/share/keyrings/ubuntu-archive-keyring.gpg"]),
];

/// The name of the configuration file of our own runs of apt.
const CONFIGURATION: &str = "apt.conf";

/// A mirror in the machine's configuration, and a suite to look into.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    uri: String,
    suite: String,
    distribution: &'static str,
}

/// Downloads the package for Rust `release` into `folder`. Without `--no-release-info` apt would list only what an
/// earlier `apt-get update` downloaded, and a fresh machine has nothing.
pub(super) fn download(release: &str, folder: &Path) -> Result<PathBuf> {
    let targets = ask(apt("apt-get").args([
        "indextargets",
        "--no-release-info",
        "--format",
        "$(CREATED_BY) $(REPO_URI) $(RELEASE)",
    ]))?;
    let places = places(&targets);
    ensure!(
        !places.is_empty(),
        "apt has no mirror of Debian or Ubuntu configured"
    );
    let mut refusals = Vec::new();
    for place in &places {
        match Private::new(folder, place)?.fetch(release) {
            Ok(package) => return Ok(package),
            Err(error) => refusals.push(format!("{}: {error:#}", place.suite)),
        }
    }
    bail!("no mirror has rust-src {release} ({})", refusals.join("; "));
}

/// Where to look, from the output of `apt-get indextargets`: the suites with new releases first.
fn places(targets: &str) -> Vec<Place> {
    let mut mirrors: Vec<Place> = Vec::new();
    for line in targets.lines() {
        let mut fields = line.split(' ');
        let (Some("Packages"), Some(uri), Some(suite)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        // A mirror is known by the folder it serves, /debian/ or /ubuntu/, or by the name of a list of mirrors.
        let distribution = match uri
            .trim_end_matches('/')
            .trim_end_matches(".list")
            .rsplit('/')
            .next()
        {
            Some("debian") => "debian",
            Some("ubuntu" | "ubuntu-ports") => "ubuntu",
            _ => continue,
        };
        let place = Place {
            uri: uri.to_owned(),
            suite: suite.to_owned(),
            distribution,
        };
        if !mirrors.contains(&place) {
            mirrors.push(place);
        }
    }
    let mut places = Vec::new();
    for mirror in &mirrors {
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
        if !places.contains(&mirror) {
            places.push(mirror);
        }
    }
    places
}

/// apt with state of its own.
struct Private {
    folder: PathBuf,
}

impl Private {
    fn new(folder: &Path, place: &Place) -> Result<Self> {
        let folder = folder.join("apt");
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("removing {} failed", folder.display()))?;
        }
        for name in ["sources", "lists/partial", "cache/archives/partial"] {
            let path = folder.join(name);
            fs::create_dir_all(&path).with_context(|| format!("creating {} failed", path.display()))?;
        }
        let rings = KEY_RINGS
            .iter()
            .find(|(name, _)| *name == place.distribution)
            .map_or(&[][..], |(_, rings)| rings);
        let signed = rings
            .iter()
            .find(|ring| Path::new(ring).is_file())
            .map_or(String::new(), |ring| format!("Signed-By: {ring}\n"));
        let components = if place.distribution == "ubuntu" {
            "main universe"
        } else {
            "main"
        };
        fs::write(
            folder.join("sources/one.sources"),
            format!(
                "Types: deb\nURIs: {}\nSuites: {}\nComponents: {components}\nTargets: Packages\n{signed}",
                place.uri, place.suite
            ),
        )
        .context("writing apt's sources failed")?;
        let configuration = [
            ("Dir::Etc::sourcelist", "/dev/null".to_owned()),
            (
                "Dir::Etc::sourceparts",
                folder.join("sources").display().to_string(),
            ),
            ("Dir::State::lists", folder.join("lists").display().to_string()),
            ("Dir::Cache", folder.join("cache").display().to_string()),
            // The folder may be below a home that apt's download user can't enter.
            ("APT::Sandbox::User", "root".to_owned()),
            ("Acquire::Languages", "none".to_owned()),
        ]
        .map(|(name, value)| format!("{name} \"{value}\";\n"));
        // What the machine runs after an update is for its own lists.
        let hooks = ["Pre-Invoke", "Post-Invoke", "Post-Invoke-Success"]
            .map(|name| format!("#clear APT::Update::{name};\n"));
        fs::write(
            folder.join(CONFIGURATION),
            hooks.concat() + &configuration.concat(),
        )
        .context("writing apt's configuration failed")?;
        Ok(Self { folder })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = apt(program);
        command
            .arg("-c")
            .arg(self.folder.join(CONFIGURATION))
            .current_dir(&self.folder);
        command
    }

    /// Reads the index of the suite, and downloads the package if it is there.
    fn fetch(&self, release: &str) -> Result<PathBuf> {
        ask(self
            .command("apt-get")
            .args(["--quiet", "--error-on=any", "update"]))?;
        let versioned = match release.rsplit_once('.') {
            Some((minor, _)) => format!("rust-{minor}-src"),
            None => release.to_owned(),
        };
        let listed = ask(self
            .command("apt-cache")
            .args(["madison", "rust-src", &versioned]))?;
        let (name, version) =
            choose(&listed, release).with_context(|| format!("it has {}", versions(&listed)))?;
        ask(self
            .command("apt-get")
            .args(["--quiet", "download", &format!("{name}={version}")]))?;
        let entries = fs::read_dir(&self.folder).context("reading the download folder failed")?;
        entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .context("apt-get download left no package")
    }
}

/// apt, speaking English and asking nothing.
fn apt(program: &str) -> Command {
    let mut command = Command::new(program);
    command
        .env("LC_ALL", "C")
        .env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// Runs a program of apt; its first complaint becomes the error.
fn ask(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .context("starting apt failed")?;
    if !output.status.success() {
        bail!("{}", complaint(&String::from_utf8_lossy(&output.stderr)));
    }
    String::from_utf8(output.stdout).context("apt printed no UTF-8")
}

/// The first error that apt printed, which explains the ones after it.
fn complaint(text: &str) -> &str {
    text.lines()
        .find_map(|line| line.strip_prefix("E: "))
        .unwrap_or("apt failed and said nothing")
        .trim()
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

    #[test]
    fn debian_mirrors_are_asked_for_backports_before_their_own_suites() {
        let places = places(
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
        let places = places(
            "Packages http://mirror.example/ubuntu/ noble\nPackages http://mirror.example/ubuntu noble-updates\n",
        );
        assert_eq!(places.len(), 2);
        assert!(places.iter().all(|place| place.distribution == "ubuntu"));
    }
}
