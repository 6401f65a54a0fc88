//! The command is there and says what it is. What it does is tested by its neighbours.

use std::process::Command;

#[test]
fn the_command_says_its_version() {
    let output = Command::new(env!("CARGO_BIN_EXE_tightfit"))
        .arg("--version")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let version = format!("tightfit {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), version);
}
