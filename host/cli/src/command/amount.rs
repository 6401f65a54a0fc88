//! Sizes as users type them.

use tightfit::device::{DeviceSpec, LocalSpec, RankedSpec};
use tightfit::types;

/// Parses a size. A number without a unit that is less than 1 MiB is taken for
/// a unit that was forgotten: `24` is rather 24 GiB than 24 bytes. Nothing (`0`) needs no unit.
///
/// # Errors
/// A sentence for what is no size, and for such a number.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let bytes = types::parse_bytes(text)?;
    let has_unit = text.contains(|c: char| c.is_ascii_alphabetic());
    let is_nothing = text.trim().parse() == Ok(0.0);
    if has_unit || is_nothing || bytes >= 1 << 20 {
        return Ok(bytes);
    }
    let number = text.trim();
    Err(format!(
        "'{text}' has no unit: write {number}GiB, {number}MiB or, for so many bytes, {number}B"
    ))
}

/// Parses a device, whose size is one of [`parse_bytes`].
pub(crate) fn parse_device(text: &str) -> Result<DeviceSpec, String> {
    let device: DeviceSpec = text.parse().map_err(|error| format!("{error}"))?;
    with_unit(text, size(&device)).map(|()| device)
}

/// Parses a device of one process or several, whose size is one of [`parse_bytes`].
pub(crate) fn parse_ranked_device(text: &str) -> Result<RankedSpec, String> {
    let spec: RankedSpec = text.parse().map_err(|error| format!("{error}"))?;
    let size = match &spec.device {
        LocalSpec::Device(device) => size(device),
        LocalSpec::LocalCuda { capacity } => *capacity,
        LocalSpec::Default => None,
    };
    with_unit(text, size).map(|()| spec)
}

/// The size that a device was given.
fn size(device: &DeviceSpec) -> Option<u64> {
    match device {
        DeviceSpec::Cuda { capacity, .. } | DeviceSpec::Cpu { capacity } => *capacity,
        DeviceSpec::Sim { capacity } => Some(*capacity),
    }
}

/// Whether the size at the end of a device, if there is one, has its unit.
fn with_unit(text: &str, size: Option<u64>) -> Result<(), String> {
    let size = size.and_then(|_| text.rsplit(':').next());
    size.map_or(Ok(()), |size| parse_bytes(size).map(|_| ()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_amount_without_a_unit_is_asked_for_one() {
        for bad in ["24", "1", "1048575", "0.5", " 24 "] {
            let error = parse_bytes(bad).unwrap_err();
            assert!(
                error.contains("has no unit") && error.contains("GiB"),
                "{error}"
            );
        }
        for (text, bytes) in [
            ("0", 0),
            ("24B", 24),
            ("24 b", 24),
            ("1k", 1024),
            ("1048576", 1 << 20),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        assert!(parse_bytes("much").is_err());
    }

    #[test]
    fn devices_need_units_too() {
        for text in ["sim:24", "cuda:0:24", "cpu:16"] {
            let error = parse_device(text).unwrap_err();
            assert!(error.contains("has no unit"), "{error}");
        }
        for text in [
            "cuda:7",
            "cpu",
            "sim:24B",
            "cuda:7:24GiB",
            "sim:0",
            "cpu:1g",
        ] {
            assert!(parse_device(text).is_ok(), "{text}");
        }
        assert!(parse_device("gpu:0").is_err());
        assert!(parse_ranked_device("1/sim:24").is_err());
        for text in ["1/sim:24B", "cuda", "cuda:24GiB", "3/cuda:7", "cpu"] {
            assert!(parse_ranked_device(text).is_ok(), "{text}");
        }
        // That is a GPU's number.
        assert!(parse_device("cuda:24GiB").is_err());
    }
}
