//! The book as mdBook gets it: everything included and generated, links to the repository's files resolved.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use pulldown_cmark::{CodeBlockKind, Event, LinkType, Options, Parser, Tag, TagEnd};

use super::reference;

/// Where files that are no pages are looked at.
const REPOSITORY: &str = "https://github.com/tightfit/tightfit";

/// Where the sources lie in the repository.
pub(crate) const SOURCES: &str = "site/src";

/// All pages, by their paths below `site/src`.
#[derive(Debug)]
pub(crate) struct Book {
    pub(crate) pages: BTreeMap<PathBuf, Page>,
}

/// One page.
#[derive(Debug)]
pub(crate) struct Page {
    /// As it is written.
    pub(crate) source: String,
    /// As mdBook reads it.
    pub(crate) text: String,
}

/// The repository that this was compiled in.
pub(crate) fn repository() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package
        .ancestors()
        .nth(2)
        .expect("it lies in host/cli")
        .to_owned()
}

impl Book {
    /// Reads the pages and all that they include. `command` is `tightfit`, whose help is a page.
    pub(crate) fn read(command: &Path) -> Result<Book, String> {
        let root = repository();
        let mut sources = BTreeMap::new();
        collect(&root.join(SOURCES), Path::new(""), &mut sources)?;
        // Pages that stand for a file of the repository.
        let mut stands_for = HashMap::new();
        for (path, source) in &sources {
            stands_for.insert(Path::new(SOURCES).join(path), path.clone());
            for included in whole_files(source) {
                stands_for.insert(
                    resolve(&Path::new(SOURCES).join(path), included)?,
                    path.clone(),
                );
            }
        }
        let mut pages = BTreeMap::new();
        for (path, source) in &sources {
            let writer = Writer {
                root: &root,
                page: path,
                stands_for: &stands_for,
                command,
            };
            let text = writer
                .expand(source)
                .map_err(|error| format!("{}: {error}", path.display()))?;
            pages.insert(
                path.clone(),
                Page {
                    source: source.clone(),
                    text,
                },
            );
        }
        Ok(Book { pages })
    }
}

fn collect(
    directory: &Path,
    below: &Path,
    pages: &mut BTreeMap<PathBuf, String>,
) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{}: {error}", directory.display());
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let below = below.join(entry.file_name());
        if entry.path().is_dir() {
            collect(&entry.path(), &below, pages)?;
        } else if below.extension().is_some_and(|extension| extension == "md") {
            pages.insert(below, fs::read_to_string(entry.path()).map_err(failed)?);
        }
    }
    Ok(())
}

/// Makes Markdown as mdBook reads it of a page.
struct Writer<'a> {
    root: &'a Path,
    page: &'a Path,
    /// By files of the repository, pages that show them.
    stands_for: &'a HashMap<PathBuf, PathBuf>,
    command: &'a Path,
}

impl Writer<'_> {
    fn expand(&self, source: &str) -> Result<String, String> {
        let here = Path::new(SOURCES).join(self.page);
        let mut text = String::new();
        for line in self.with_links_of(&here, source)?.lines() {
            match directive(line) {
                None => text += line,
                Some(("include", argument)) => text += self.include(&here, argument)?.trim_end(),
                Some(("generate", what)) => {
                    text += reference::generate(what, self.command)?.trim_end()
                }
                Some((other, _)) => return Err(format!("there is no directive {other}")),
            }
            text += "\n";
        }
        Ok(text)
    }

    fn include(&self, here: &Path, argument: &str) -> Result<String, String> {
        let (file, anchor) = match argument.split_once(':') {
            Some((file, anchor)) => (file, Some(anchor)),
            None => (argument, None),
        };
        let path = resolve(here, file)?;
        let text = fs::read_to_string(self.root.join(&path))
            .map_err(|error| format!("{}: {error}", path.display()))?;
        let text = match anchor {
            Some(anchor) => {
                between(&text, anchor).ok_or(format!("{file} has no anchor {anchor}"))?
            }
            None => without_anchors(&text),
        };
        match path.extension().is_some_and(|extension| extension == "md") {
            true => self.with_links_of(&path, &text),
            false => Ok(text),
        }
    }

    /// Text of a file of the repository, with links that hold in the book.
    fn with_links_of(&self, file: &Path, text: &str) -> Result<String, String> {
        let mut replaced = text.to_owned();
        for (range, target) in links(text)?.into_iter().rev() {
            let target = self.link(file, &target)?;
            replaced.replace_range(range, &target);
        }
        Ok(replaced)
    }

    fn link(&self, file: &Path, target: &str) -> Result<String, String> {
        if is_external(target) || target.starts_with('#') {
            return Ok(target.to_owned());
        }
        let (path, anchor) = match target.split_once('#') {
            Some((path, anchor)) => (path, format!("#{anchor}")),
            None => (target, String::new()),
        };
        let path = resolve(file, path)?;
        if let Some(page) = self.stands_for.get(&path) {
            let up = "../".repeat(self.page.components().count() - 1);
            return Ok(format!("{up}{}{anchor}", page.display()));
        }
        let kind = match lead_to(self.root, &path, &anchor)? {
            true => "tree",
            false => "blob",
        };
        Ok(format!(
            "{REPOSITORY}/{kind}/main/{}{anchor}",
            path.display()
        ))
    }
}

/// Makes sure that a path in the repository, and a heading in it, is there. Gives whether it is a directory.
fn lead_to(root: &Path, path: &Path, anchor: &str) -> Result<bool, String> {
    let there = fs::metadata(root.join(path))
        .map_err(|error| format!("link to {}: {error}", path.display()))?;
    let is_text = path.extension().is_some_and(|extension| extension == "md");
    if let Some(id) = anchor.strip_prefix('#').filter(|_| is_text) {
        let text = fs::read_to_string(root.join(path)).map_err(|error| error.to_string())?;
        if !headings(&text).iter().any(|heading| heading == id) {
            return Err(format!("{} has no heading {anchor}", path.display()));
        }
    }
    Ok(there.is_dir())
}

/// Makes sure that all links of a document of the repository lead somewhere.
pub(crate) fn check_document(document: &Path) -> Result<(), String> {
    let root = repository();
    let text = fs::read_to_string(root.join(document)).map_err(|error| error.to_string())?;
    for (_, target) in links(&text)? {
        if is_external(&target) {
            continue;
        }
        let (path, anchor) = match target.find('#') {
            Some(at) => target.split_at(at),
            None => (&*target, ""),
        };
        match path {
            "" => lead_to(&root, document, anchor)?,
            path => lead_to(&root, &resolve(document, path)?, anchor)?,
        };
    }
    Ok(())
}

/// Whether a link leads out of the repository.
pub(crate) fn is_external(target: &str) -> bool {
    target.contains("://") || target.starts_with("mailto:")
}

/// A line that is a directive as a whole: its name and its argument.
pub(crate) fn directive(line: &str) -> Option<(&str, &str)> {
    line.trim()
        .strip_prefix("{{#")?
        .strip_suffix("}}")?
        .split_once(' ')
}

/// Files that a page includes as a whole, outside of code.
fn whole_files(source: &str) -> Vec<&str> {
    let mut in_code = false;
    let mut files = Vec::new();
    for line in source.lines() {
        in_code ^= line.starts_with("```");
        match directive(line) {
            Some(("include", file)) if !in_code && !file.contains(':') => files.push(file),
            _ => {}
        }
    }
    files
}

/// A path in the repository, from a relative one in a file.
fn resolve(from: &Path, relative: &str) -> Result<PathBuf, String> {
    let mut path = from.parent().unwrap_or(Path::new("")).to_owned();
    for component in Path::new(relative).components() {
        let inside = match component {
            Component::Normal(name) => {
                path.push(name);
                true
            }
            Component::ParentDir => path.pop(),
            Component::CurDir => true,
            Component::RootDir | Component::Prefix(_) => false,
        };
        if !inside {
            return Err(format!("{relative} leads out of the repository"));
        }
    }
    Ok(path)
}

/// What lies between an anchor's lines, without those of other anchors.
fn between(text: &str, anchor: &str) -> Option<String> {
    let is = |line: &str, mark: &str| {
        line.split_once(mark)
            .is_some_and(|(_, name)| name.split_whitespace().next() == Some(anchor))
    };
    let begin = text.lines().position(|line| is(line, "ANCHOR: "))?;
    let length = text
        .lines()
        .skip(begin)
        .position(|line| is(line, "ANCHOR_END: "))?;
    let lines: Vec<&str> = text.lines().skip(begin).take(length).collect();
    Some(without_anchors(&lines.join("\n")))
}

fn without_anchors(text: &str) -> String {
    let lines = text
        .lines()
        .filter(|line| !line.contains("ANCHOR: ") && !line.contains("ANCHOR_END: "));
    lines.collect::<Vec<_>>().join("\n")
}

/// A reader of Markdown with what mdBook has beyond CommonMark.
pub(crate) fn parser(text: &str) -> Parser<'_> {
    Parser::new_ext(text, Options::ENABLE_TABLES | Options::ENABLE_STRIKETHROUGH)
}

/// Where each link's and picture's target stands, and the target.
pub(crate) fn links(text: &str) -> Result<Vec<(Range<usize>, String)>, String> {
    let mut found = Vec::new();
    for (event, range) in parser(text).into_offset_iter() {
        let (Event::Start(Tag::Link {
            link_type,
            dest_url,
            ..
        })
        | Event::Start(Tag::Image {
            link_type,
            dest_url,
            ..
        })) = event
        else {
            continue;
        };
        let target = dest_url.into_string();
        if link_type != LinkType::Inline {
            match is_external(&target) {
                true => found.push((0..0, target)),
                false => {
                    return Err(format!(
                        "the link to {target} is none of the form [text](target)"
                    ));
                }
            }
            continue;
        }
        let begin = text[range.clone()].rfind(&format!("]({target}"));
        let begin = range.start + begin.ok_or(format!("the link to {target} is not plain"))? + 2;
        found.push((begin..begin + target.len(), target));
    }
    // What is not inline leads out and is not replaced.
    found.retain(|(range, target)| !range.is_empty() || is_external(target));
    Ok(found)
}

/// The ids of a page's headings, as mdBook and GitHub make them.
pub(crate) fn headings(text: &str) -> Vec<String> {
    let mut ids: Vec<String> = Vec::new();
    let mut heading: Option<String> = None;
    for event in parser(text) {
        match event {
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            Event::Text(piece) | Event::Code(piece) => {
                if let Some(heading) = &mut heading {
                    *heading += &piece;
                }
            }
            Event::End(TagEnd::Heading(_)) => {
                let id = heading_id(&heading.take().unwrap_or_default());
                let mut unique = id.clone();
                let mut count = 0;
                while ids.contains(&unique) {
                    count += 1;
                    unique = format!("{id}-{count}");
                }
                ids.push(unique);
            }
            _ => {}
        }
    }
    ids
}

fn heading_id(heading: &str) -> String {
    let known = heading.chars().filter_map(|c| match c {
        c if c.is_alphanumeric() || c == '_' || c == '-' => Some(c.to_ascii_lowercase()),
        c if c.is_whitespace() => Some('-'),
        _ => None,
    });
    known.collect()
}

/// A block of code.
#[derive(Debug)]
pub(crate) struct Block {
    /// Of its first line, from 1.
    pub(crate) line: usize,
    /// What stands behind the fence, in parts.
    pub(crate) info: Vec<String>,
    pub(crate) text: String,
}

/// The blocks of code in a text.
pub(crate) fn blocks(text: &str) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut inside = false;
    for (event, range) in parser(text).into_offset_iter() {
        match event {
            Event::Start(Tag::CodeBlock(kind)) => {
                let info = match &kind {
                    CodeBlockKind::Fenced(info) => &**info,
                    CodeBlockKind::Indented => "",
                };
                blocks.push(Block {
                    line: text[..range.start].lines().count() + 2,
                    info: info.split([',', ' ']).map(str::to_owned).collect(),
                    text: String::new(),
                });
                inside = true;
            }
            Event::Text(piece) if inside => {
                if let Some(block) = blocks.last_mut() {
                    block.text += &piece;
                }
            }
            Event::End(TagEnd::CodeBlock) => inside = false,
            _ => {}
        }
    }
    blocks
}
