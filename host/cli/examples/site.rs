//! Makes what mdBook builds the site from, and checks what it has built; `site/build.sh` uses it.
//!
//! ```text
//! site write TIGHTFIT DIR      the sources and book.toml, for mdBook; TIGHTFIT is the command, whose help is in it
//! site check DIR               links of the book in DIR; those that lead out of it are listed, not followed
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[path = "../tests/site/book.rs"]
#[allow(dead_code, reason = "the tests look at more of it")]
mod book;
#[path = "../tests/site/reference.rs"]
mod reference;

use book::{Book, is_external, repository};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments[..] {
        ["write", command, directory] => write(Path::new(command), Path::new(directory)),
        ["check", directory] => check(Path::new(directory)),
        _ => Err("usage: site write TIGHTFIT DIR | site check DIR".to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("site: {error}");
            ExitCode::FAILURE
        }
    }
}

fn write(command: &Path, directory: &Path) -> Result<(), String> {
    let book = Book::read(command)?;
    let write = || {
        for (path, page) in &book.pages {
            let path = directory.join("src").join(path);
            fs::create_dir_all(path.parent().expect("it is below src"))?;
            fs::write(path, &page.text)?;
        }
        for name in ["book.toml", "site.css"] {
            fs::copy(repository().join("site").join(name), directory.join(name))?;
        }
        Ok(())
    };
    write().map_err(|error: std::io::Error| format!("{}: {error}", directory.display()))
}

/// One page as HTML: what it links to, and what can be linked to in it.
#[derive(Debug)]
struct Html {
    targets: Vec<String>,
    ids: BTreeSet<String>,
}

fn check(directory: &Path) -> Result<(), String> {
    let mut pages = BTreeMap::new();
    collect(directory, &mut pages).map_err(|error| format!("{}: {error}", directory.display()))?;
    let (mut broken, mut external, mut internal) = (Vec::new(), BTreeSet::new(), 0);
    for (path, page) in &pages {
        for target in &page.targets {
            // Pictures in the page itself.
            if target.starts_with("data:") {
                continue;
            }
            if is_external(target) {
                external.insert(target.clone());
                continue;
            }
            internal += 1;
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let file = match file {
                "" => path.clone(),
                file => path.with_file_name(file).canonicalize().unwrap_or_default(),
            };
            let known = match pages.get(&file) {
                Some(page) => anchor.is_empty() || page.ids.contains(anchor),
                None => anchor.is_empty() && file.exists(),
            };
            if !known {
                broken.push(format!("{}: {target}", path.display()));
            }
        }
    }
    for target in &external {
        println!("leads out: {target}");
    }
    println!(
        "{} pages, {internal} links within, {} out",
        pages.len(),
        external.len()
    );
    match broken.is_empty() && pages.len() > 1 && internal > 0 {
        true => Ok(()),
        false => Err(format!("these links lead nowhere:\n{}", broken.join("\n"))),
    }
}

fn collect(directory: &Path, pages: &mut BTreeMap<PathBuf, Html>) -> std::io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path().canonicalize()?;
        if path.is_dir() {
            collect(&path, pages)?;
        } else if path
            .extension()
            .is_some_and(|extension| extension == "html")
        {
            // Its links are relative to wherever it is shown.
            if path.file_name().is_some_and(|name| name == "404.html") {
                continue;
            }
            let text = fs::read_to_string(&path)?;
            pages.insert(
                path,
                Html {
                    targets: [attributes(&text, " href=\""), attributes(&text, " src=\"")].concat(),
                    ids: attributes(&text, " id=\"").into_iter().collect(),
                },
            );
        }
    }
    Ok(())
}

/// The values of an attribute, as mdBook writes them.
fn attributes(html: &str, name: &str) -> Vec<String> {
    let pieces = html.split(name).skip(1);
    pieces
        .filter_map(|piece| piece.split('"').next())
        .map(unescaped)
        .collect()
}

fn unescaped(text: &str) -> String {
    text.replace("&quot;", "\"")
        .replace("&#39;", "'")
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&amp;", "&")
}
