//! Sizes as users write them.

use std::fmt;

/// Why a text is no number of bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ParseBytesError {
    /// It is not a number with a unit.
    NotASize {
        /// The text.
        text: String,
    },
    /// It is more than 2^64 - 1.
    TooLarge {
        /// The text.
        text: String,
    },
}

impl fmt::Display for ParseBytesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ParseBytesError::NotASize { text } => write!(
                f,
                "'{text}' is not a size such as 24GiB or 512MiB: use a number with B, KiB, MiB, GiB, \
                 TiB, KB, MB, GB or TB"
            ),
            ParseBytesError::TooLarge { text } => write!(f, "'{text}' does not fit in 64 bits"),
        }
    }
}

impl std::error::Error for ParseBytesError {}

/// Parses a number of bytes: `1234`, `64MiB`, `1.5 GiB`, `24GB`. Units with an `i` and single letters
/// (`512M`) are binary, `KB`, `MB`, `GB` and `TB` are decimal; upper and lower case are the same. Parts
/// of a byte are dropped.
///
/// # Errors
/// [`ParseBytesError`], which quotes the text.
pub fn parse_bytes(text: &str) -> Result<u64, ParseBytesError> {
    let not_a_size = || ParseBytesError::NotASize { text: text.into() };
    let trimmed = text.trim();
    let end = trimmed
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(end);
    let unit: u128 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "ki" | "kib" => 1 << 10,
        "m" | "mi" | "mib" => 1 << 20,
        "g" | "gi" | "gib" => 1 << 30,
        "t" | "ti" | "tib" => 1 << 40,
        "kb" => 1000,
        "mb" => 1000u128.pow(2),
        "gb" => 1000u128.pow(3),
        "tb" => 1000u128.pow(4),
        _ => return Err(not_a_size()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    // Nine digits are below a byte for every unit that people mean, and keep the product in range.
    if !digits(whole) || !digits(fraction) || fraction.len() > 9 {
        return Err(not_a_size());
    }
    let too_large = || ParseBytesError::TooLarge { text: text.into() };
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let fraction: (u128, u32) = match fraction.parse() {
        Ok(value) => (value, fraction.len() as u32),
        Err(_) => return Err(not_a_size()),
    };
    let bytes = u128::from(whole) * unit + fraction.0 * unit / 10u128.pow(fraction.1);
    u64::try_from(bytes).map_err(|_| too_large())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("1000", 1000),
            (" 24 B ", 24),
            ("2GiB", 2 << 30),
            ("2 gib", 2 << 30),
            ("1.5GiB", 3 << 29),
            ("0.1KB", 100),
            ("0.3KiB", 307),
            ("512M", 512 << 20),
            ("512MB", 512_000_000),
            ("16Ti", 16 << 40),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn everything_else_is_no_size() {
        for text in [
            "",
            "GiB",
            ".",
            "1.",
            ".5GiB",
            "1.2.3",
            "-1",
            "+1",
            "1 GiB more",
            "1e9",
            "½GiB",
            "0.0000000001TiB",
            "12 parsecs",
            "1e400TiB",
        ] {
            let error = parse_bytes(text).unwrap_err();
            assert!(
                matches!(error, ParseBytesError::NotASize { .. }),
                "{text}: {error}"
            );
        }
        for text in [
            "18446744073709551616",
            "16777216TiB",
            "99999999999999999999GiB",
            "18446744073709551615.999999999KiB",
        ] {
            let error = parse_bytes(text).unwrap_err();
            assert!(
                matches!(error, ParseBytesError::TooLarge { .. }),
                "{text}: {error}"
            );
            assert!(error.to_string().contains(text));
        }
    }
}
