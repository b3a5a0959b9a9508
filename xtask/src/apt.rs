//! Apt: packages of any suite of the machine's own mirrors, downloaded without touching the system.
//!
//! apt runs with sources, lists and cache of its own in a folder, but with the machine's mirrors, proxies and keys. So
//! apt itself checks the signature of the release file, the sum of the package index in it, and the sum of the package
//! in that, before it hands the file out.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

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

/// How often apt asks a mirror again that did not answer.
const RETRIES: u32 = 4;

/// A mirror in the machine's configuration, and a suite to look into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The mirror's folder, as apt names it.
    pub(crate) uri: String,
    /// The suite, such as `trixie`.
    pub(crate) suite: String,
    /// `debian` or `ubuntu`.
    pub(crate) distribution: &'static str,
}

/// The suites of Debian and Ubuntu that the machine is configured for. Without `--no-release-info` apt would list only
/// what an earlier `apt-get update` downloaded, and a fresh machine has nothing.
pub(crate) fn configured() -> Result<Vec<Place>> {
    let targets = ask(apt("apt-get").args([
        "indextargets",
        "--no-release-info",
        "--format",
        "$(CREATED_BY) $(REPO_URI) $(RELEASE)",
    ]))?;
    Ok(places(&targets))
}

/// The places in the output of `apt-get indextargets`.
pub(crate) fn places(targets: &str) -> Vec<Place> {
    let mut places: Vec<Place> = Vec::new();
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
        if !places.contains(&place) {
            places.push(place);
        }
    }
    places
}

/// apt with state of its own.
pub(crate) struct Private {
    folder: PathBuf,
}

impl Private {
    /// Makes it in the folder `apt` below `folder`, for one place. What was in there is removed.
    pub(crate) fn new(folder: &Path, place: &Place) -> Result<Self> {
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
            ("Acquire::Retries", RETRIES.to_string()),
            ("Acquire::http::Timeout", "60".to_owned()),
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

    /// Downloads the index of the suite.
    pub(crate) fn update(&self) -> Result<()> {
        ask(self
            .command("apt-get")
            .args(["--quiet", "--error-on=any", "update"]))
        .map(drop)
    }

    /// What `apt-cache` prints for `arguments`.
    pub(crate) fn cache(&self, arguments: &[&str]) -> Result<String> {
        ask(self.command("apt-cache").args(arguments))
    }

    /// Downloads one package, `NAME` or `NAME=VERSION`.
    pub(crate) fn download(&self, package: &str) -> Result<PathBuf> {
        let name = package.split('=').next().unwrap_or(package);
        ask(self.command("apt-get").args(["--quiet", "download", package]))
            .with_context(|| format!("downloading {package} failed"))?;
        let entries = fs::read_dir(&self.folder).context("reading the download folder failed")?;
        entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| {
                let file = path.file_name().unwrap_or_default().to_string_lossy();
                file.ends_with(".deb") && file.split('_').next() == Some(name)
            })
            .with_context(|| format!("apt-get download left no package {name}"))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_mirrors_of_debian_and_ubuntu_each_once() {
        let places = places(
            "DEP-11 http://mirror.example/debian/ bookworm\nPackages http://mirror.example/debian/ bookworm\n\
             Packages http://mirror.example/debian/ bookworm\nPackages http://mirror.example/ubuntu noble\n\
             Packages https://other.example/tools node\n",
        );
        let found: Vec<_> = places
            .iter()
            .map(|place| (place.suite.as_str(), place.distribution))
            .collect();
        assert_eq!(found, [("bookworm", "debian"), ("noble", "ubuntu")]);
    }

    #[test]
    fn the_first_complaint_is_the_error() {
        assert_eq!(
            complaint("W: odd\nE: no such host\nE: giving up\n"),
            "no such host"
        );
        assert_eq!(complaint(""), "apt failed and said nothing");
    }
}
