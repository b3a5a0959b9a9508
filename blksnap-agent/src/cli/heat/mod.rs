//! `cbt heat`: where on a device blocks changed, and how long ago, as a picture.

mod drawing;
mod palette;
mod png;
mod svg;
mod terminal;

use std::ffi::OsStr;
use std::io::IsTerminal as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use super::size::human;
use super::{Context, Output, absolute, print, write_out};
use crate::control::api::Heat as Picture;
use crate::control::client::with_query;
use terminal::Colours;

/// Columns of what is no terminal.
const COLUMNS: usize = 80;
/// Rows of cells on a terminal, at most.
const ROWS: usize = 16;
/// Columns that offsets take.
const LABELS: usize = 12;
/// Cells in a row of a terminal: powers of two, so that rows begin at round offsets.
const WIDTHS: [usize; 4] = [128, 64, 32, 16];
/// Cells of a picture in a file.
const CELLS: u64 = 2048;

/// When to use colours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum When {
    /// On a terminal that has them, unless `NO_COLOR` is set
    #[default]
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// Form of the picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Text,
    Json,
    Svg,
    Png,
}

pub(super) async fn run(
    context: &Context,
    device: &Path,
    file: Option<&Path>,
    cells: Option<u64>,
    color: When,
) -> Result<()> {
    let file = file.filter(|file| *file != Path::new("-"));
    let form = form(context.output, file);
    let on_terminal = file.is_none() && std::io::stdout().is_terminal();
    if form == Form::Png && on_terminal {
        bail!("draw {}: a terminal shows no PNG: name a file", device.display());
    }
    let columns = columns(on_terminal);
    let most = cells.unwrap_or(match form {
        Form::Text => (columns * ROWS) as u64,
        Form::Json | Form::Svg | Form::Png => CELLS,
    });
    let device = absolute(device)?;
    let path = with_query(
        "/v1/cbt/heat",
        &[("device", &device), ("buckets", &most.to_string())],
    );
    let picture: Picture = context.client.get(&path).await?;
    let bytes = match form {
        Form::Json if file.is_none() => return print(Output::Json, &picture, |_| String::new()),
        Form::Json => serde_json::to_vec_pretty(&picture)?,
        Form::Text => {
            let variable = |name: &str| std::env::var(name).unwrap_or_default();
            let colours = colours(color, on_terminal, &variable);
            terminal::text(&picture, columns, colours).into_bytes()
        }
        Form::Svg => svg::file(&drawing::draw(&picture)).into_bytes(),
        Form::Png => png::file(&drawing::draw(&picture))?,
    };
    match file {
        Some(file) => std::fs::write(file, bytes).with_context(|| format!("write {}", file.display())),
        None => write_out(&bytes),
    }
}

/// What was asked for, or else what the name of the file says.
fn form(output: Output, file: Option<&Path>) -> Form {
    let extension = file.and_then(Path::extension).and_then(OsStr::to_str);
    match (output, extension) {
        (Output::Svg, _) | (Output::Text, Some("svg")) => Form::Svg,
        (Output::Png, _) | (Output::Text, Some("png")) => Form::Png,
        (Output::Json, _) | (Output::Text, Some("json")) => Form::Json,
        (Output::Text, _) => Form::Text,
    }
}

/// Cells in a row.
fn columns(on_terminal: bool) -> usize {
    let all = if on_terminal {
        terminal_size::terminal_size().map_or(COLUMNS, |(width, _)| usize::from(width.0))
    } else {
        COLUMNS
    };
    WIDTHS
        .into_iter()
        .find(|width| width + LABELS <= all)
        .unwrap_or(WIDTHS[WIDTHS.len() - 1])
}

/// What the terminal shows, by what is said of it in the environment.
fn colours(color: When, on_terminal: bool, variable: &dyn Fn(&str) -> String) -> Colours {
    let term = variable("TERM");
    let wanted = match color {
        When::Always => true,
        When::Never => false,
        When::Auto => on_terminal && variable("NO_COLOR").is_empty() && term != "dumb" && !term.is_empty(),
    };
    if !wanted {
        Colours::Plain
    } else if ["truecolor", "24bit"].contains(&variable("COLORTERM").as_str()) || term.contains("direct") {
        Colours::True
    } else {
        Colours::Indexed
    }
}

/// The first line.
fn headline(picture: &Picture) -> String {
    let heat = &picture.heat;
    let take = match heat.active_number - 1 {
        0 => "no take yet".to_owned(),
        number => format!("last take {number}"),
    };
    let doubt = heat.corrupted.map_or_else(String::new, |reason| {
        format!(", MAY LACK CHANGES: {}", reason.code())
    });
    format!(
        "{}: {}, generation {}, {take}{doubt}",
        picture.device.replace(char::is_control, "?"),
        human(heat.device_capacity),
        heat.generation,
    )
}

/// What a cell is.
fn unit_line(picture: &Picture) -> String {
    let heat = &picture.heat;
    let blocks = match heat.bucket_size / heat.block_size {
        1 => "one block".to_owned(),
        blocks => format!("{blocks} blocks of {}", human(heat.block_size)),
    };
    format!("each cell is {}: {blocks}", human(heat.bucket_size))
}

/// An offset, exact where that takes at most three digits after the point, as of a row of cells.
fn place(offset: u64) -> String {
    const UNITS: [(u32, &str); 5] = [(50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let exact = UNITS
        .into_iter()
        .find(|(shift, _)| offset >> shift > 0 && offset.is_multiple_of(1 << (shift - 3)));
    exact.map_or_else(
        || human(offset),
        |(shift, unit)| format!("{} {unit}", offset as f64 / (1_u64 << shift) as f64),
    )
}

#[cfg(test)]
mod samples {
    //! Pictures of maps made by hand.

    use uuid::Uuid;

    use super::Picture;
    use crate::cbt::{Blocks, CbtMap, Heat};
    use crate::units::{BlockSize, Generation, Sectors};

    /// The heat of blocks of 4 KiB.
    pub(super) fn heat(bytes: &[u8], active: u8, most: u64) -> Heat {
        let size = BlockSize::from_shift(12).unwrap();
        let capacity = Sectors::new(bytes.len() as u64 * 8);
        let map = CbtMap::new(Generation::new(Uuid::from_u128(1)), size, capacity).unwrap();
        Heat::new(&map.info(), active, &Blocks::from(bytes.to_vec()), most)
    }

    pub(super) fn picture(bytes: &[u8], active: u8, most: u64) -> Picture {
        Picture {
            device: "/dev/sdb1".to_owned(),
            heat: heat(bytes, active, most),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_is_what_was_asked_for_or_what_the_file_is_called() {
        let of = |output, file: &str| form(output, Some(Path::new(file)));
        assert_eq!(form(Output::Text, None), Form::Text);
        assert_eq!(of(Output::Text, "a.svg"), Form::Svg);
        assert_eq!(of(Output::Text, "a.png"), Form::Png);
        assert_eq!(of(Output::Text, "png"), Form::Text);
        assert_eq!(of(Output::Svg, "a.png"), Form::Svg);
        assert_eq!(of(Output::Json, "a.png"), Form::Json);
    }

    #[test]
    fn rows_begin_at_exact_offsets() {
        let said = [0, 512, 4096, 5 << 18, (1 << 30) + (1 << 27), 3 << 43].map(place);
        assert_eq!(said, ["0 B", "512 B", "4 KiB", "1.25 MiB", "1.125 GiB", "24 TiB"]);
        // Finer than that it is told in the smaller unit.
        assert_eq!(place((1 << 30) + (1 << 20)), "1025 MiB");
    }

    #[test]
    fn colours_are_what_the_terminal_has_and_the_user_wants() {
        let of = |color, terminal, variables: &[(&str, &str)]| {
            colours(color, terminal, &|name: &str| {
                let found = variables.iter().find(|(known, _)| *known == name);
                found.map_or_else(String::new, |(_, value)| (*value).to_owned())
            })
        };
        let xterm = ("TERM", "xterm-256color");
        assert_eq!(of(When::Auto, true, &[xterm]), Colours::Indexed);
        assert_eq!(
            of(When::Auto, true, &[xterm, ("COLORTERM", "truecolor")]),
            Colours::True
        );
        assert_eq!(of(When::Auto, true, &[xterm, ("NO_COLOR", "1")]), Colours::Plain);
        assert_eq!(of(When::Auto, false, &[xterm]), Colours::Plain);
        assert_eq!(of(When::Auto, true, &[("TERM", "dumb")]), Colours::Plain);
        assert_eq!(of(When::Always, false, &[("NO_COLOR", "1")]), Colours::Indexed);
        assert_eq!(of(When::Never, true, &[xterm]), Colours::Plain);
    }
}
