//! SVG: the drawing as text. Pointing at a cell shows what is in it.

use std::fmt::Write as _;

use super::drawing::{Anchor, Drawing, PAPER, Shape};
use super::palette::Rgb;

/// Size of the letters, in pixels.
const LETTERS: u32 = 16;

/// The file.
pub(super) fn file(drawing: &Drawing) -> String {
    let (width, height) = (drawing.width, drawing.height);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"DejaVu Sans Mono, Menlo, Consolas, monospace\" font-size=\"{LETTERS}\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"{}\"/>\n",
        hex(PAPER)
    );
    for shape in &drawing.shapes {
        add(&mut text, shape);
    }
    text.push_str("</svg>\n");
    text
}

fn add(file: &mut String, shape: &Shape) {
    // Writing to a string can't fail.
    let _ = match shape {
        Shape::Rectangle {
            x,
            y,
            width,
            height,
            colour,
        } => writeln!(
            file,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"{}\"/>",
            hex(*colour)
        ),
        Shape::Words {
            x,
            y,
            anchor,
            bold,
            colour,
            text,
        } => writeln!(
            file,
            "<text x=\"{x}\" y=\"{y}\" dominant-baseline=\"central\"{}{} fill=\"{}\">{}</text>",
            if *anchor == Anchor::End {
                " text-anchor=\"end\""
            } else {
                ""
            },
            if *bold { " font-weight=\"bold\"" } else { "" },
            hex(*colour),
            escape(text)
        ),
        Shape::Group { title, shapes } => {
            let begun = write!(file, "<g><title>{}</title>", escape(title));
            for shape in shapes {
                add(file, shape);
            }
            begun.and_then(|()| writeln!(file, "</g>"))
        }
    };
}

fn hex(Rgb(red, green, blue): Rgb) -> String {
    format!("#{red:02x}{green:02x}{blue:02x}")
}

/// Text as it may stand in an element (a path may contain anything).
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\n' => escaped.push('\n'),
            control if control.is_control() => escaped.push('?'),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::super::{drawing, samples};
    use super::*;

    #[test]
    fn a_path_can_not_break_the_file() {
        let mut picture = samples::picture(&[1; 8], 2, 8);
        picture.device = "/dev/<a>&\u{7}".to_owned();
        let file = file(&drawing::draw(&picture));
        assert!(file.contains("/dev/&lt;a&gt;&amp;?: "), "{file}");
        assert_eq!(file.matches("<g>").count(), file.matches("</g>").count());
        assert_eq!(file.matches("<g>").count(), 8);
    }
}
