//! What a page shows, done: its blocks as one script of the shell, in a directory of its own.

use std::fmt::Write as _;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use super::book::{Block, repository};

/// What the site has people depend on, and where it lies here.
const PACKAGES: &[(&str, &str)] = &[("tightfit-guest", "guest")];

/// Where processes on the site meet.
const ADDRESS: &str = "127.0.0.1:29671";

/// An address at which nobody listens.
fn free_address() -> std::io::Result<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}

/// Runs blocks of one page, in order. `command` is `tightfit`. Gives what did not hold.
pub(crate) fn run(command: &Path, page: &Path, blocks: &[Block]) -> Result<(), String> {
    let directory = TempDir::new().map_err(|error| error.to_string())?;
    let place = |name: &str| -> Result<PathBuf, String> {
        let path = directory.path().join(name);
        fs::create_dir(&path).map_err(|error| error.to_string())?;
        Ok(path)
    };
    let (work, home, bin, out) = (place("work")?, place("home")?, place("bin")?, place("out")?);
    std::os::unix::fs::symlink(command, bin.join("tightfit")).map_err(|error| error.to_string())?;
    let (mut script, steps) = script(blocks);
    // Others may run the same page on this machine.
    script = script.replace(ADDRESS, &free_address().map_err(|error| error.to_string())?);
    fs::write(directory.path().join("script"), script).map_err(|error| error.to_string())?;
    let mut shell = Command::new("sh");
    shell
        .arg(directory.path().join("script"))
        .current_dir(&work)
        .stdin(Stdio::null());
    // What cargo says of this build is not for the builds of a page.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO") || text.starts_with("RUST") || text.starts_with("HF_") {
            shell.env_remove(&name);
        }
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths([bin].into_iter().chain(std::env::split_paths(&path)));
    shell
        .env("PATH", path.map_err(|error| error.to_string())?)
        .env("HOME", &home)
        .env("OUT", &out)
        .env("HF_HUB_OFFLINE", "1")
        .env("CUDA_VISIBLE_DEVICES", "")
        .env("LC_ALL", "C")
        .env("CARGO_TERM_QUIET", "true")
        // What it compiles is there the next time.
        .env(
            "CARGO_BUILD_BUILD_DIR",
            Path::new(env!("CARGO_TARGET_TMPDIR")).join("site"),
        );
    for (name, directory) in [("CARGO_HOME", ".cargo"), ("RUSTUP_HOME", ".rustup")] {
        let theirs = std::env::var_os(name).map(PathBuf::from);
        let usual = || std::env::home_dir().map(|home| home.join(directory));
        if let Some(path) = theirs.or_else(usual) {
            shell.env(name, path);
        }
    }
    let output = shell
        .output()
        .map_err(|error| format!("there is no sh: {error}"))?;
    let mut errors = String::new();
    for (index, step) in steps.iter().enumerate() {
        let printed = fs::read_to_string(out.join(index.to_string()));
        let at = format!("{}:{}: {}", page.display(), step.line, step.command);
        let Ok(printed) = printed else {
            // The one before has ended the script.
            let _ = writeln!(errors, "{at}\nwas not reached");
            break;
        };
        let is_last = !out.join((index + 1).to_string()).exists();
        if is_last && !output.status.success() {
            let _ = writeln!(
                errors,
                "{at}\nended the page ({}):\n{printed}",
                output.status
            );
            break;
        }
        if step
            .expected
            .as_ref()
            .is_some_and(|expected| !matches(expected, &printed))
        {
            let expected = step.expected.as_deref().unwrap_or_default();
            let _ = writeln!(
                errors,
                "{at}\nthe page shows:\n{expected}\nit printed:\n{}",
                beginning(&printed)
            );
        }
    }
    match errors.is_empty() {
        true => Ok(()),
        false => Err(errors + &String::from_utf8_lossy(&output.stderr)),
    }
}

/// What a person looks at.
fn beginning(text: &str) -> String {
    let lines: Vec<&str> = text.lines().take(40).collect();
    lines.join("\n")
}

/// A command and what it is to print, where the page shows that.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    line: usize,
    command: String,
    expected: Option<String>,
}

/// Asks for the status of the command before, which may be any.
const STATUS: &str = "echo $?";

fn script(blocks: &[Block]) -> (String, Vec<Step>) {
    let mut script = "set -eu\n".to_owned();
    let mut all: Vec<Step> = Vec::new();
    for block in blocks {
        let steps = match file(block) {
            Some(file) => {
                let mut text = block.text.clone();
                for (package, directory) in PACKAGES {
                    let theirs = "git = \"https://github.com/tightfit/tightfit\"";
                    let ours = format!("path = \"{}\"", repository().join(directory).display());
                    let named = format!("{package} = {{ ");
                    text = text.replace(&format!("{named}{theirs}"), &format!("{named}{ours}"));
                }
                let end = "END-OF-FILE";
                let text = text.trim_end();
                let mut command = format!("cat > '{file}' <<'{end}'\n{text}\n{end}");
                if file == "Cargo.toml" {
                    // The same versions as here, which are there already.
                    let lock = repository().join("Cargo.lock");
                    command += &format!("\ncp '{}' .", lock.display());
                }
                vec![Step {
                    line: block.line,
                    command,
                    expected: None,
                }]
            }
            None if block.info[0] == "console" => console(block),
            None => vec![Step {
                line: block.line,
                command: block.text.clone(),
                expected: None,
            }],
        };
        for (index, step) in steps.iter().enumerate() {
            let number = all.len() + index;
            let _ = match (
                &*step.command,
                steps.get(index + 1).map(|next| &*next.command),
            ) {
                (STATUS, _) => writeln!(script, "echo \"$status\" > \"$OUT/{number}\""),
                (command, Some(STATUS)) => writeln!(
                    script,
                    "status=0; {{ {command}\n}} > \"$OUT/{number}\" 2>&1 || status=$?"
                ),
                (command, _) => writeln!(script, "{{ {command}\n}} > \"$OUT/{number}\" 2>&1"),
            };
        }
        all.extend(steps);
    }
    (script, all)
}

/// The file that a block is to be written into.
pub(crate) fn file(block: &Block) -> Option<&str> {
    block
        .info
        .iter()
        .find_map(|part| part.strip_prefix("file="))
}

/// The commands of a block that shows a terminal. One that ends with `\` goes on in the next line.
fn console(block: &Block) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut goes_on = false;
    for (number, line) in block.text.lines().enumerate() {
        match (line.strip_prefix("$ "), steps.last_mut()) {
            (Some(command), _) => {
                goes_on = command.ends_with('\\');
                let (line, command) = (block.line + number, command.to_owned());
                steps.push(Step {
                    line,
                    command,
                    expected: Some(String::new()),
                });
            }
            (None, Some(step)) if goes_on => {
                goes_on = line.ends_with('\\');
                step.command = format!("{}\n{line}", step.command);
            }
            (None, Some(step)) => {
                let expected = step.expected.get_or_insert_default();
                *expected += line;
                *expected += "\n";
            }
            (None, None) => {
                // Something that nobody typed.
                let command = format!("echo 'a block begins with a command'; false # {line}");
                steps.push(Step {
                    line: block.line,
                    command,
                    expected: None,
                });
            }
        }
    }
    steps
}

/// Whether a text is as it was expected. `...` stands for anything within a line, and alone on one for
/// any lines.
fn matches(expected: &str, printed: &str) -> bool {
    fn of_lines(expected: &[&str], printed: &[&str]) -> bool {
        match (expected, printed) {
            ([], []) => true,
            (["...", rest @ ..], _) => {
                (0..=printed.len()).any(|skipped| of_lines(rest, &printed[skipped..]))
            }
            ([line, expected @ ..], [printed_line, printed @ ..]) => {
                of_line(line, printed_line) && of_lines(expected, printed)
            }
            _ => false,
        }
    }
    fn of_line(expected: &str, printed: &str) -> bool {
        match expected.split_once("...") {
            None => expected == printed,
            Some((begin, rest)) => printed.strip_prefix(begin).is_some_and(|printed| {
                let ends = printed
                    .char_indices()
                    .map(|(at, _)| at)
                    .chain([printed.len()]);
                ends.into_iter().any(|at| of_line(rest, &printed[at..]))
            }),
        }
    }
    let lines = |text: &str| -> Vec<String> {
        text.trim_end()
            .lines()
            .map(|line| line.trim_end().to_owned())
            .collect()
    };
    let (expected, printed) = (lines(expected), lines(printed));
    let borrowed = |lines: &[String]| -> Vec<String> { lines.to_vec() };
    let (expected, printed) = (borrowed(&expected), borrowed(&printed));
    let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
    let printed: Vec<&str> = printed.iter().map(String::as_str).collect();
    of_lines(&expected, &printed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(info: &str, text: &str) -> Block {
        Block {
            line: 10,
            info: vec![info.to_owned()],
            text: text.to_owned(),
        }
    }

    #[track_caller]
    fn fails(blocks: &[Block], words: &[&str]) {
        let error = run(Path::new("/bin/false"), Path::new("page.md"), blocks).unwrap_err();
        for word in words {
            assert!(error.contains(word), "it lacks `{word}`: {error}");
        }
    }

    #[test]
    fn a_page_is_one_session() {
        let blocks = [
            block("sh", "mkdir a\ncd a\nname=value\n"),
            block("file=x y", "one\n'two'\n"),
            Block {
                info: vec!["toml".to_owned(), "file=b".to_owned()],
                ..block("", "one\n$two\n")
            },
            block(
                "console",
                "$ cat b\none\n$two\n$ echo \"$name\" \\\n    and more\nvalue ...\n$ false\n$ echo $?\n1\n",
            ),
        ];
        run(Path::new("/bin/false"), Path::new("page.md"), &blocks).unwrap();
    }

    #[test]
    fn what_does_not_hold_is_told() {
        fails(
            &[block("console", "$ echo b\na\n")],
            &["page.md:10: echo b", "shows:\na", "printed:\nb"],
        );
        fails(
            &[block("sh", "true\nfalse\ntrue\n")],
            &["page.md:10", "ended the page (exit status: 1)"],
        );
        let blocks = [block("sh", "tightfit plan model\n"), block("sh", "true\n")];
        fails(&blocks, &["tightfit plan model", "exit status: 1"]);
        fails(
            &[block("console", "no command\n")],
            &["a block begins with a command"],
        );
        fails(
            &[block("console", "$ true\n$ false\n$ echo $?\n0\n")],
            &["echo $?", "printed:\n1"],
        );
        fails(&[block("console", "$ echo more\n")], &["printed:\nmore"]);
    }

    #[test]
    fn dots_stand_for_anything() {
        for (expected, printed) in [
            ("a ... c", "a b c"),
            ("a\n...\nd", "a\nd"),
            ("a\n...\nd", "a\nb\nc\nd"),
            ("...", ""),
            ("a", "a  \n\n"),
            ("1...3...5", "12345"),
        ] {
            assert!(matches(expected, printed), "{expected} {printed}");
        }
        for (expected, printed) in [
            ("a ... c", "a b d"),
            ("a\n...", "b"),
            ("a", "a\nb"),
            ("a\nb", "a"),
            ("", "a"),
        ] {
            assert!(!matches(expected, printed), "{expected} {printed}");
        }
    }
}
