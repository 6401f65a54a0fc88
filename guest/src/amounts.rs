//! Bytes as people read them, with two digits.

/// Returns a need as text: rounded up, so that it is never understated.
pub fn need(bytes: u64) -> String {
    let unit = unit(bytes);
    in_hundredths((u128::from(bytes) * 100).div_ceil(unit), unit)
}

/// Returns what there is as text: rounded down, so that it is never overstated.
pub fn have(bytes: u64) -> String {
    let unit = unit(bytes);
    in_hundredths(u128::from(bytes) * 100 / unit, unit)
}

/// GiB, or MiB where that would be mostly zeros.
fn unit(bytes: u64) -> u128 {
    if bytes >= 100 << 20 { 1 << 30 } else { 1 << 20 }
}

fn in_hundredths(hundredths: u128, unit: u128) -> String {
    let name = if unit == 1 << 30 { "GiB" } else { "MiB" };
    format!("{}.{:02} {name}", hundredths / 100, hundredths % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needs_are_rounded_up_and_haves_down() {
        for (bytes, up, down) in [
            (0, "0.00 MiB", "0.00 MiB"),
            (1, "0.01 MiB", "0.00 MiB"),
            (3 << 19, "1.50 MiB", "1.50 MiB"),
            (100 << 20, "0.10 GiB", "0.09 GiB"),
            ((1 << 30) + 1, "1.01 GiB", "1.00 GiB"),
            (u64::MAX, "17179869184.00 GiB", "17179869183.99 GiB"),
        ] {
            assert_eq!((need(bytes).as_str(), have(bytes).as_str()), (up, down));
        }
    }
}
