//! Refusal: what the kernel says of programs and maps, in one line.

/// An error and its causes in one line.
pub(crate) fn one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text.replace('\n', " ")
}

/// The end of a message: the kernel's verifier says last what it refused, after pages of how it got there.
pub(crate) fn verdict(message: &str) -> String {
    const MOST: usize = 400;
    // Where the verifier was not even asked there is nothing behind this.
    let message = message
        .trim_end()
        .trim_end_matches("Verifier output:")
        .trim_end_matches(['.', ' ']);
    match message.char_indices().rev().nth(MOST) {
        Some((cut, _)) => {
            tracing::debug!(message, "the kernel refused the programs");
            format!("…{}", &message[cut..])
        }
        None => message.to_owned(),
    }
}
