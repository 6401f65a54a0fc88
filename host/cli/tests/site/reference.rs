//! Pages that nobody writes: what the command says of itself, and the fields of its JSON.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// What a directive `generate` stands for.
pub(crate) fn generate(what: &str, command: &Path) -> Result<String, String> {
    match what {
        "commands" => commands(command),
        "drawing" => drawing(command),
        "policies" => policies(command),
        "python" => python(),
        "schema" => schema(),
        _ => Err(format!("nothing is known of how to generate {what}")),
    }
}

/// What the command prints.
fn ask(command: &Path, arguments: &[&str]) -> Result<String, String> {
    ask_in(Path::new("."), command, arguments)
}

fn ask_in(directory: &Path, command: &Path, arguments: &[&str]) -> Result<String, String> {
    let command = command.canonicalize().unwrap_or(command.to_owned());
    let output = Command::new(&command)
        .args(arguments)
        .current_dir(directory)
        .env("NO_COLOR", "1")
        .output();
    let output = output.map_err(|error| format!("{}: {error}", command.display()))?;
    match output.status.success() {
        true => String::from_utf8(output.stdout).map_err(|error| error.to_string()),
        false => Err(format!(
            "tightfit {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}

fn block(title: &str, text: &str) -> String {
    format!("## {title}\n\n```text\n{}\n```\n\n", text.trim_end())
}

/// Help of every command, and of commands of commands. The exit statuses, which each lists, stand once.
fn commands(command: &Path) -> Result<String, String> {
    let help = ask(command, &["help"])?;
    let mut page = block("tightfit", &help);
    for name in subcommands(&help) {
        add(command, &mut page, &[name])?;
    }
    Ok(page)
}

fn add(command: &Path, page: &mut String, names: &[&str]) -> Result<(), String> {
    let help = ask(command, &[&["help"], names].concat())?;
    let shown = match names {
        ["check"] => &help,
        _ => {
            help.split_once("\nExit status:")
                .ok_or("help lists no exit statuses")?
                .0
        }
    };
    *page += &block(&format!("tightfit {}", names.join(" ")), shown);
    for name in subcommands(&help) {
        add(command, page, &[names, &[name]].concat())?;
    }
    Ok(())
}

/// The names in the list of commands.
fn subcommands(help: &str) -> Vec<&str> {
    let Some((_, list)) = help.split_once("\nCommands:\n") else {
        return Vec::new();
    };
    let lines = list.lines().take_while(|line| !line.is_empty());
    let names = lines.filter_map(|line| line.split_whitespace().next());
    names.filter(|&name| name != "help").collect()
}

/// A plan for two cards as `--svg` draws it, as a picture in the page.
fn drawing(command: &Path) -> Result<String, String> {
    let directory = tempfile::tempdir().map_err(|error| error.to_string())?;
    let ask = |arguments: &str| -> Result<String, String> {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        ask_in(directory.path(), command, &arguments)
    };
    ask("synth qwen3-30b-a3b model --headers-only --quiet")?;
    let plan = "plan model --device sim:12GiB --device sim:12GiB --set context=32768 --svg -";
    let svg = ask(plan)?;
    let mut address = String::new();
    for byte in svg.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' => {
                address.push(byte.into())
            }
            _ => {
                let _ = write!(address, "%{byte:02X}");
            }
        }
    }
    Ok(format!(
        "<img alt=\"A bar for each of two cards, and what their bytes are for\" src=\"data:image/svg+xml,{address}\">"
    ))
}

fn policies(command: &Path) -> Result<String, String> {
    let mut page = String::new();
    for name in ask(command, &["policy", "list"])?.lines() {
        page += &block(name, &ask(command, &["policy", "show", name])?);
    }
    Ok(page)
}

/// The functions of the Python package: how they are called and what is said of them.
fn python() -> Result<String, String> {
    let source = include_str!("../../../python/python/tightfit/_api.py");
    let package = include_str!("../../../python/python/tightfit/__init__.py");
    let public = package
        .lines()
        .find_map(|line| line.strip_prefix("from ._api import "))
        .ok_or("the Python package has no functions")?;
    let mut shown = String::new();
    for function in source.split("\n\n\ndef ").skip(1) {
        let mut pieces = function.splitn(3, "\"\"\"");
        let (head, said) = pieces.next().zip(pieces.next()).unwrap_or_default();
        let name = head.split('(').next().unwrap_or_default();
        if !public.split(", ").any(|known| known == name) {
            continue;
        }
        let _ = writeln!(shown, "def {head}\"\"\"{said}\"\"\"\n\n");
    }
    match shown.is_empty() {
        true => Err("no function of the Python package was found".to_owned()),
        false => Ok(format!("```python\n{}\n```\n", shown.trim_end())),
    }
}

/// The schema's definitions as lists of fields.
fn schema() -> Result<String, String> {
    let schema: Value = serde_json::from_str(include_str!("../../output.schema.json"))
        .map_err(|error| error.to_string())?;
    let definitions = schema["$defs"]
        .as_object()
        .ok_or("the schema has no definitions")?;
    let mut page = String::new();
    for (name, definition) in definitions {
        let _ = writeln!(page, "## {name}\n\n{}\n", description(definition));
        let mut rows = String::new();
        fields(definition, "", &mut rows);
        if !rows.is_empty() {
            let _ = writeln!(page, "| field | type | |\n|---|---|---|\n{rows}");
        }
    }
    Ok(page)
}

fn description(schema: &Value) -> String {
    schema["description"]
        .as_str()
        .unwrap_or_default()
        .replace('|', "\\|")
}

/// A row for each field, those of objects in it below it.
fn fields(schema: &Value, path: &str, rows: &mut String) {
    let required: Vec<&str> = match schema["required"].as_array() {
        Some(names) => names.iter().filter_map(Value::as_str).collect(),
        None => Vec::new(),
    };
    let named = schema["properties"].as_object().into_iter().flatten();
    for (name, field) in named {
        let name = format!("{path}{name}");
        let is_required = required.contains(&name.rsplit('.').next().unwrap_or_default());
        let _ = writeln!(
            rows,
            "| `{name}`{} | {} | {} |",
            if is_required { "" } else { " (not always)" },
            kind(field),
            description(field),
        );
        fields(field, &format!("{name}."), rows);
        fields(&field["items"], &format!("{name}[]."), rows);
    }
    if let Some(field @ Value::Object(_)) = schema.get("additionalProperties") {
        let name = format!("{path}*");
        let _ = writeln!(
            rows,
            "| `{name}` | {} | {} |",
            kind(field),
            description(field)
        );
        fields(field, &format!("{name}."), rows);
    }
}

/// What a field holds, in a word or a link to its definition.
fn kind(schema: &Value) -> String {
    if let Some(name) = schema["$ref"]
        .as_str()
        .and_then(|name| name.strip_prefix("#/$defs/"))
    {
        return format!("[{name}](#{name})");
    }
    if let Some(values) = schema["enum"].as_array() {
        let words: Vec<String> = values.iter().map(|value| format!("`{value}`")).collect();
        return words.join(", ").replace('"', "");
    }
    if let Some(value) = schema.get("const") {
        return format!("`{value}`");
    }
    for choice in ["anyOf", "oneOf"] {
        if let Some(kinds) = schema[choice].as_array() {
            return kinds.iter().map(kind).collect::<Vec<_>>().join(" or ");
        }
    }
    match &schema["type"] {
        Value::Array(types) => {
            let types: Vec<&str> = types.iter().filter_map(Value::as_str).collect();
            types.join(" or ")
        }
        Value::String(name) if name == "array" => match kind(&schema["items"]) {
            items if items.is_empty() => "array".to_owned(),
            items => format!("array of {items}"),
        },
        Value::String(name) => name.clone(),
        _ => String::new(),
    }
}
