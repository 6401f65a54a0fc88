//! The site: its links lead somewhere, and what it shows is so. `site/README.md` says what is done with which block.
#![cfg(unix)]

mod book;
mod reference;
mod session;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use book::{Block, Book, blocks, directive, headings, is_external, links, repository};
use tightfit_tests::command::tightfit;

/// Blocks that are not run, by page and first line, with the reason.
const NOT_RUN: &[(&str, &str, &str)] = &[
    (
        "start/application.md",
        "cargo new first-load",
        "wasmtime is compiled for minutes; tests/tests/examples.rs compiles and runs the program",
    ),
    (
        "start/application.md",
        "cargo build --release -p tightfit-c",
        "cargo has built it for host/c/tests/programs.rs",
    ),
    (
        "start/application.md",
        "cc -I host/c/include host/c/examples/first_load.c -L target/release -ltightfit_c -o first_load",
        "host/c/tests/programs.rs compiles and runs it in two ways",
    ),
    (
        "how-to/ranks.md",
        "torchrun --no-python --nproc-per-node 4 tightfit load model",
        "it takes torch, Slurm and GPUs; launchers' variables are tested in host/cli/tests/command/ranks.rs",
    ),
    (
        "how-to/python.md",
        "pip install ./host/python",
        "it compiles wasmtime; .ci/run python builds and installs the package",
    ),
];

fn book() -> Book {
    Book::read(&tightfit()).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn every_link_leads_somewhere() {
    let book = book();
    let mut wrong = Vec::new();
    for (path, page) in &book.pages {
        for (_, target) in links(&page.text).unwrap() {
            if is_external(&target) {
                continue;
            }
            let (file, anchor) = target.split_once('#').unwrap_or((&target, ""));
            let file = match file {
                "" => Some(path.clone()),
                file => resolve(path, file),
            };
            let leads_to = file.as_ref().and_then(|file| book.pages.get(file));
            let known = |page: &book::Page| headings(&page.text).iter().any(|id| id == anchor);
            if !leads_to.is_some_and(|page| anchor.is_empty() || known(page)) {
                wrong.push(format!("{}: {target}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "these lead nowhere: {wrong:#?}");
}

/// What people read who have the repository before them.
const DOCUMENTS: &[&str] = &[
    "ARCHITECTURE.md",
    "BENCHMARKS.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "RELEASING.md",
    "SECURITY.md",
    "fuzz/README.md",
    "guest/README.md",
    "guest/SCENARIOS.md",
    "guest/examples/c/README.md",
    "guest/examples/javascript/README.md",
    "guest/examples/python/README.md",
    "host/cli/JSON.md",
    "host/python/README.md",
    "site/README.md",
    "tests/golden/README.md",
    "tests/golden/quant/README.md",
    "tests/versions/README.md",
    "wit/README.md",
    "wit/REFERENCE.md",
];

#[test]
fn every_link_of_a_document_leads_somewhere() {
    let wrong: Vec<String> = DOCUMENTS
        .iter()
        .filter_map(|name| {
            let error = book::check_document(Path::new(name)).err()?;
            Some(format!("{name}: {error}"))
        })
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn resolve(from: &Path, target: &str) -> Option<std::path::PathBuf> {
    let mut path = from.parent()?.to_owned();
    for part in target.split('/') {
        match part {
            ".." => {
                path.pop().then_some(())?;
            }
            part => path.push(part),
        }
    }
    Some(path)
}

#[test]
fn every_page_is_in_the_summary() {
    let book = book();
    let summary = &book.pages[Path::new("SUMMARY.md")].text;
    let listed: BTreeSet<String> = links(summary)
        .unwrap()
        .into_iter()
        .map(|(_, target)| target)
        .collect();
    let pages = book.pages.keys().map(|path| path.display().to_string());
    let pages: BTreeSet<String> = pages.filter(|path| path != "SUMMARY.md").collect();
    assert_eq!(listed, pages);
}

/// What is done with a block.
enum Kind {
    /// It is run, or written into a file.
    Done,
    /// It is shown only.
    Shown,
}

/// Decides it; an error where nobody would notice that it does not hold.
fn kind(page: &str, block: &Block) -> Result<Kind, String> {
    let first = block.text.lines().next().unwrap_or_default();
    let included: Vec<&str> = block
        .text
        .lines()
        .filter_map(|line| directive(line).filter(|(name, _)| *name == "include"))
        .map(|(_, file)| file)
        .collect();
    let is_included = !included.is_empty() && included.len() == block.text.lines().count();
    if NOT_RUN
        .iter()
        .any(|(path, line, _)| *path == page && *line == first)
    {
        return Ok(Kind::Shown);
    }
    let language = block.info[0].as_str();
    match language {
        _ if session::file(block).is_some() => Ok(Kind::Done),
        "console" | "sh" => Ok(Kind::Done),
        _ if is_included => {
            let mut files = included.iter();
            files.try_for_each(|file| is_tested(page, language, file))?;
            Ok(Kind::Shown)
        }
        _ => Err("it is neither run nor included, nor listed in NOT_RUN".to_owned()),
    }
}

/// Whether code that is included is compiled and run by a test: where that is, it is named.
fn is_tested(page: &str, language: &str, file: &str) -> Result<(), String> {
    let path = resolve(
        &Path::new(book::SOURCES).join(page),
        file.split(':').next().unwrap_or(file),
    );
    let path = path
        .ok_or("it leads out of the repository")?
        .display()
        .to_string();
    // The reference shows what is compiled anyway.
    if page.starts_with("reference/") {
        return Ok(());
    }
    let tests = match language {
        "rust" if path.starts_with("guest/examples/") => "tests/src/foreign.rs",
        "rust" => "tests/tests/examples.rs",
        "c" => "host/c/tests/programs.rs",
        "python" => "host/python/tests/test_example.py",
        _ => return Ok(()),
    };
    let name = match language {
        "rust" if path.starts_with("guest/examples/") => path.split('/').nth(2),
        _ => path.split('/').next_back(),
    };
    let name = name.ok_or("it has no name")?;
    let text = fs::read_to_string(repository().join(tests))
        .map_err(|error| format!("{tests}: {error}"))?;
    match text.contains(name) {
        true => Ok(()),
        false => Err(format!("{tests} does not run {name}")),
    }
}

/// A test for each page that shows commands.
macro_rules! pages {
    ($($test:ident: $page:literal,)*) => {
        const PAGES: &[&str] = &[$($page),*];

        mod what_is_shown_is_so_in {
            $(#[test]
            fn $test() {
                super::is_so($page);
            })*
        }
    };
}

pages! {
    start_model: "start/model.md",
    start_application: "start/application.md",
    start_policy: "start/policy.md",
    how_to_small_card: "how-to/small-card.md",
    how_to_several_cards: "how-to/several-cards.md",
    how_to_formats: "how-to/formats.md",
    how_to_ranks: "how-to/ranks.md",
    how_to_save: "how-to/save.md",
    how_to_look: "how-to/look.md",
    how_to_check: "how-to/check.md",
    explain_sandbox: "explain/sandbox.md",
    compare: "compare.md",
}

#[track_caller]
fn is_so(page: &str) {
    let book = book();
    let page_of = &book.pages[Path::new(page)];
    let mut done = Vec::new();
    for block in blocks(&page_of.source) {
        if matches!(kind(page, &block), Ok(Kind::Done)) {
            done.push(block);
        }
    }
    // What a file is written with may be included.
    let expanded = blocks(&page_of.text);
    for block in &mut done {
        if directive(block.text.trim()).is_some() {
            let whole = expanded.iter().find(|whole| whole.info == block.info);
            block.text = whole.expect("it is there, expanded").text.clone();
        }
    }
    assert!(!done.is_empty(), "{page} shows no command");
    if let Err(error) = session::run(&tightfit(), Path::new(page), &done) {
        panic!("{error}");
    }
}

#[test]
fn nothing_is_shown_that_no_test_looks_at() {
    let mut wrong = Vec::new();
    let mut unused = NOT_RUN.to_vec();
    for (path, page) in &book().pages {
        let name = path.display().to_string();
        for block in blocks(&page.source) {
            let first = block.text.lines().next().unwrap_or_default();
            unused.retain(|(page, line, _)| (*page, *line) != (&*name, first));
            match kind(&name, &block) {
                Ok(Kind::Done) if !PAGES.contains(&&*name) => {
                    wrong.push(format!("{name} has commands and no test"));
                }
                Ok(_) => {}
                Err(error) => wrong.push(format!("{name}:{}: {error}", block.line)),
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(
        unused.is_empty(),
        "NOT_RUN lists what is not there: {unused:#?}"
    );
}

/// What a comparison claims was measured, word for word.
#[test]
fn figures_of_the_comparison_are_in_the_measurements() {
    let measured = fs::read_to_string(repository().join("BENCHMARKS.md")).unwrap();
    let figures = |text: &str| -> BTreeSet<String> {
        let pieces = text.split(|c: char| !c.is_ascii_digit() && !".,".contains(c));
        let trimmed = pieces.map(|piece| piece.trim_matches(['.', ',']).to_owned());
        trimmed.filter(|piece| !piece.is_empty()).collect()
    };
    let known = figures(&measured);
    let page = &book().pages[Path::new("compare.md")].source;
    let rows = page
        .lines()
        .filter(|line| line.starts_with("| ") && line.contains(char::is_numeric));
    let shown: BTreeSet<String> = rows.flat_map(figures).collect();
    assert!(shown.len() > 20, "{shown:?}");
    let unknown: Vec<&String> = shown.difference(&known).collect();
    assert!(unknown.is_empty(), "not in BENCHMARKS.md: {unknown:?}");
}
