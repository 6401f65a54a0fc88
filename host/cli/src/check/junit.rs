//! The form of the report that CI systems show.

use quick_xml::Writer;
use quick_xml::events::{BytesDecl, BytesText, Event};

use super::outcome::{CaseReport, CaseStatus, CheckReport, FileReport};
use tightfit::text::printable;

/// Returns the report as JUnit XML: a suite for each file.
pub fn junit(report: &CheckReport) -> String {
    let mut writer = Writer::new_with_indent(Vec::new(), b' ', 2);
    // Writing into memory does not fail.
    let _ = write(report, &mut writer);
    String::from_utf8_lossy(&writer.into_inner()).into_owned() + "\n"
}

fn write(report: &CheckReport, writer: &mut Writer<Vec<u8>>) -> std::io::Result<()> {
    writer.write_event(Event::Decl(BytesDecl::new("1.0", Some("UTF-8"), None)))?;
    let tests = report.ok + report.failed + report.errors;
    writer
        .create_element("testsuites")
        .with_attributes([
            ("name", "tightfit check"),
            ("tests", tests.to_string().as_str()),
            ("failures", report.failed.to_string().as_str()),
            ("errors", report.errors.to_string().as_str()),
        ])
        .write_inner_content(|writer| {
            report.files.iter().try_for_each(|file| suite(file, writer))
        })?;
    Ok(())
}

fn suite(file: &FileReport, writer: &mut Writer<Vec<u8>>) -> std::io::Result<()> {
    let name = allowed(&file.file.display().to_string());
    let seconds: f64 = file.cases.iter().map(|case| case.seconds).sum();
    writer
        .create_element("testsuite")
        .with_attributes([
            ("name", name.as_str()),
            ("tests", file.cases.len().to_string().as_str()),
            (
                "failures",
                file.count(CaseStatus::Failed).to_string().as_str(),
            ),
            ("errors", file.count(CaseStatus::Error).to_string().as_str()),
            ("time", format!("{seconds:.3}").as_str()),
        ])
        .write_inner_content(|writer| {
            file.cases
                .iter()
                .try_for_each(|one| case(&name, one, writer))
        })?;
    Ok(())
}

fn case(suite: &str, case: &CaseReport, writer: &mut Writer<Vec<u8>>) -> std::io::Result<()> {
    let element = writer.create_element("testcase").with_attributes([
        ("name", allowed(&case.name).as_str()),
        ("classname", suite),
        ("time", format!("{:.3}", case.seconds).as_str()),
    ]);
    let (tag, message, lines) = match case.status {
        CaseStatus::Ok => {
            element.write_empty()?;
            return Ok(());
        }
        CaseStatus::Error => {
            let error = case.error.clone().unwrap_or_default();
            ("error", error.clone(), vec![error])
        }
        CaseStatus::Failed => {
            let failed: Vec<_> = case
                .expectations
                .iter()
                .filter(|finding| !finding.holds)
                .collect();
            let message = failed.iter().map(|finding| finding.expected.as_str());
            let message = message.collect::<Vec<_>>().join("; ");
            let lines = failed.iter().map(|finding| {
                let tensors = match finding.shown_tensors() {
                    none if none.is_empty() => none,
                    some => format!(": {some}"),
                };
                format!(
                    "expected {}, found {}{tensors}",
                    finding.expected, finding.found
                )
            });
            ("failure", message, lines.collect())
        }
    };
    let lines: Vec<String> = lines.iter().map(|line| allowed(line)).collect();
    element.write_inner_content(|writer| {
        writer
            .create_element(tag)
            .with_attribute(("message", allowed(&message).as_str()))
            .write_text_content(BytesText::new(&lines.join("\n")))?;
        Ok(())
    })?;
    Ok(())
}

/// Without what XML 1.0 has no way to say: controls and noncharacters are escaped as everywhere.
fn allowed(text: &str) -> String {
    printable(text).into_owned()
}
