//! Who may do something with a file, as Windows writes it down (SDDL): its owner, and a list of entries,
//! each with what it allows, or denies, to whom.

/// Accounts that may do everything anyway, by their short names: the system, administrators; and two that
/// stand for whoever owns the file, or makes one in the directory.
const TRUSTED: [&str; 4] = ["SY", "BA", "OW", "CO"];

/// Returns the text for a directory or a file that is this user's alone, and so is what is made in it.
/// Whoever administers the machine is kept, as everywhere in a profile.
pub(super) fn private(user: &str) -> String {
    format!("O:{user}D:P(A;OICI;FA;;;{user})(A;OICI;FA;;;SY)(A;OICI;FA;;;BA)")
}

/// Checks that a file is this user's, and nobody else may do anything with it; `user` as such texts have
/// it.
///
/// # Errors
/// What is wrong with it. What is not understood is.
pub(super) fn check(text: &str, user: &str) -> Result<(), String> {
    let unclear = || format!("who has access to it is not understood ({text})");
    let (owner, list) = text
        .strip_prefix("O:")
        .and_then(|rest| rest.split_once("D:"))
        .ok_or_else(unclear)?;
    // Not the stand-ins.
    if owner != user && !TRUSTED[..2].contains(&owner) {
        return Err(format!("it belongs to another user ({owner})"));
    }
    // Before the first entry stand flags; one of them is for a list that is not there.
    let (flags, entries) = list.split_at(list.find('(').unwrap_or(list.len()));
    if flags.contains("NO_ACCESS_CONTROL") {
        return Err("everybody has access to it".to_owned());
    }
    if entries.is_empty() {
        return Ok(());
    }
    let entries = entries
        .strip_prefix('(')
        .and_then(|entries| entries.strip_suffix(')'))
        .ok_or_else(unclear)?;
    for entry in entries.split(")(") {
        let fields: Vec<&str> = entry.split(';').collect();
        // What has conditions has parentheses and more fields.
        let [kind, _, _, _, _, account] = fields[..] else {
            return Err(unclear());
        };
        if entry.contains(['(', ')']) {
            return Err(unclear());
        }
        let denies = ["D", "OD"].contains(&kind);
        if !denies && account != user && !TRUSTED.contains(&account) {
            return Err(format!("others have access to it ({account})"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const USER: &str = "S-1-5-21-1-2-3-1001";

    #[test]
    fn what_is_made_private_is_private() {
        check(&private(USER), USER).unwrap();
        // The first account of a machine has a short name.
        check(&private("LA"), "LA").unwrap();
    }

    #[test]
    fn a_profile_directory_is_private() {
        for text in [
            format!("O:BAD:AI(A;OICIID;FA;;;SY)(A;OICIID;FA;;;BA)(A;OICIID;FA;;;{USER})"),
            format!("O:SYD:(A;;FA;;;{USER})(A;OICIIO;FA;;;CO)"),
            // Nobody may do anything.
            format!("O:{USER}D:P"),
            format!("O:{USER}D:(D;;FA;;;WD)(A;;FA;;;OW)"),
        ] {
            check(&text, USER).unwrap();
        }
    }

    #[test]
    fn what_others_may_touch_is_refused_and_so_is_what_is_not_understood() {
        for (text, problem) in [
            ("O:S-1-5-21-1-2-3-1002D:P(A;;FA;;;SY)", "another user"),
            ("O:S-1-5-21-1-2-3-100D:P", "another user"),
            ("O:OWD:P", "another user"),
            ("O:SYD:NO_ACCESS_CONTROL", "everybody"),
            ("O:SYD:(A;;FR;;;WD)", "others have access to it (WD)"),
            ("O:SYD:P(A;;FA;;;SY)(A;OICIIO;0x1200a9;;;AU)", "(AU)"),
            ("O:SYD:(OA;;FR;;;BU)", "(BU)"),
            ("O:SYD:(A;;FR;;;S-1-5-21-1-2-3-10011)", "others"),
            (
                "O:SYD:(XA;;FX;;;WD;(@User.Title==\"PM\"))",
                "not understood",
            ),
            ("O:SYD:(A;;FA;;;SY", "not understood"),
            ("O:SYD:(A;;FA;;SY)", "not understood"),
            ("O:SYD:()", "not understood"),
            ("O:SY", "not understood"),
            ("D:(A;;FA;;;SY)", "not understood"),
            ("", "not understood"),
        ] {
            let error = check(text, USER).unwrap_err();
            assert!(error.contains(problem), "{text}: {error}");
        }
    }
}
