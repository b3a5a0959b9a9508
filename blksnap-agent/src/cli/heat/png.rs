//! PNG: the drawing as pixels, two for each of the drawing's in both directions.

use std::convert::Infallible;

use anyhow::{Context as _, Result};
use embedded_graphics::Drawable as _;
use embedded_graphics::Pixel;
use embedded_graphics::draw_target::DrawTarget;
use embedded_graphics::geometry::{OriginDimensions, Point, Size};
use embedded_graphics::mono_font::MonoTextStyle;
use embedded_graphics::mono_font::iso_8859_15::{FONT_9X18, FONT_9X18_BOLD};
use embedded_graphics::pixelcolor::{Rgb888, RgbColor as _};
use embedded_graphics::text::{Alignment, Baseline, Text, TextStyleBuilder};

use super::drawing::{Anchor, Drawing, PAPER, Shape};
use super::palette::Rgb;

/// Pixels of the file for one of the drawing.
const SCALE: u32 = 2;

/// The file.
pub(super) fn file(drawing: &Drawing) -> Result<Vec<u8>> {
    let mut canvas = Canvas::new(drawing.width, drawing.height);
    for shape in &drawing.shapes {
        canvas.add(shape);
    }
    canvas.encode()
}

/// The pixels: three bytes each.
struct Canvas {
    width: u32,
    height: u32,
    bytes: Vec<u8>,
}

impl Canvas {
    fn new(width: u32, height: u32) -> Self {
        let pixels = (width * SCALE * height * SCALE) as usize;
        Self {
            width,
            height,
            bytes: [PAPER.0, PAPER.1, PAPER.2].repeat(pixels),
        }
    }

    /// Fills a rectangle of the drawing's pixels; what is outside is left out.
    fn fill(&mut self, (x, y): (u32, u32), (width, height): (u32, u32), Rgb(red, green, blue): Rgb) {
        let line = (self.width * SCALE * 3) as usize;
        let left = (x.min(self.width) * SCALE * 3) as usize;
        let right = ((x + width).min(self.width) * SCALE * 3) as usize;
        let lines = (y * SCALE) as usize..((y + height).min(self.height) * SCALE) as usize;
        for row in self
            .bytes
            .chunks_exact_mut(line)
            .take(lines.end)
            .skip(lines.start)
        {
            for pixel in row[left..right].chunks_exact_mut(3) {
                pixel.copy_from_slice(&[red, green, blue]);
            }
        }
    }

    fn add(&mut self, shape: &Shape) {
        match shape {
            Shape::Rectangle {
                x,
                y,
                width,
                height,
                colour,
            } => self.fill((*x, *y), (*width, *height), *colour),
            Shape::Words {
                x,
                y,
                anchor,
                bold,
                colour,
                text,
            } => {
                let font = if *bold { &FONT_9X18_BOLD } else { &FONT_9X18 };
                let style = MonoTextStyle::new(font, Rgb888::new(colour.0, colour.1, colour.2));
                let alignment = match anchor {
                    Anchor::Start => Alignment::Left,
                    Anchor::End => Alignment::Right,
                };
                let place = TextStyleBuilder::new()
                    .alignment(alignment)
                    .baseline(Baseline::Middle)
                    .build();
                let at = Point::new(x.cast_signed(), y.cast_signed());
                let Ok(_) = Text::with_text_style(text, at, style, place).draw(self);
            }
            Shape::Group { shapes, .. } => {
                for shape in shapes {
                    self.add(shape);
                }
            }
        }
    }

    fn encode(&self) -> Result<Vec<u8>> {
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, self.width * SCALE, self.height * SCALE);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder
            .write_header()
            .and_then(|mut writer| writer.write_image_data(&self.bytes))
            .context("make the PNG")?;
        Ok(file)
    }
}

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        Size::new(self.width, self.height)
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> Result<(), Infallible> {
        for Pixel(at, colour) in pixels {
            if let (Ok(x), Ok(y)) = (u32::try_from(at.x), u32::try_from(at.y)) {
                self.fill((x, y), (1, 1), Rgb(colour.r(), colour.g(), colour.b()));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{drawing, samples};
    use super::*;

    #[test]
    fn the_file_is_a_png_of_the_drawing() {
        let mut drawing = drawing::draw(&samples::picture(&[1, 2, 0, 0], 2, 4));
        // One that reaches over the edge.
        drawing.shapes.push(Shape::Rectangle {
            x: drawing.width - 5,
            y: drawing.height - 5,
            width: 10,
            height: 10,
            colour: Rgb(1, 2, 3),
        });
        let file = file(&drawing).unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!(
            (info.width, info.height),
            (drawing.width * SCALE, drawing.height * SCALE)
        );
        assert_eq!(pixels[..3], [255, 255, 255]);
        assert_eq!(pixels[pixels.len() - 3..], [1, 2, 3]);
        // The newest age is in it.
        let red = super::super::palette::of_age(0).rgb;
        assert!(
            pixels
                .chunks_exact(3)
                .any(|pixel| *pixel == [red.0, red.1, red.2])
        );
    }
}
