//! `tightfit check`.

use crate::check::{CaseReport, CaseStatus, CheckReport, Runner, ScenarioFile, junit};
use tightfit::cancel::CancelToken;
use tightfit::text::printable;

use crate::command::args::CheckOptions;
use crate::command::error::CommandError;
use crate::command::output;

pub(crate) fn run(
    options: &CheckOptions,
    verbose: bool,
    cancel: &CancelToken,
) -> Result<(), CommandError> {
    let files = read(options)?;
    let mut runner = Runner::new(options.sandbox.options()?);
    let mut reports = Vec::new();
    for file in &files {
        reports.push(runner.run_file(file, cancel)?);
    }
    let report = CheckReport::new(reports);
    let mut written = false;
    if let Some(path) = &options.junit {
        written = output::write("--junit", path, &junit(&report), options.json)?;
    }
    if written {
        // It is the result.
    } else if options.json {
        output::print_json(&report)?;
    } else {
        output::print(&text(&report, options.quiet, verbose))?;
    }
    if report.holds() {
        return Ok(());
    }
    Err(CommandError::Unexpected {
        failed: report.failed + report.errors,
        cases: report.ok + report.failed + report.errors,
    })
}

/// All files, or the last one's error after those of the others: whoever mends them wants to see
/// all.
fn read(options: &CheckOptions) -> Result<Vec<ScenarioFile>, CommandError> {
    let mut files = Vec::new();
    let mut failure: Option<CommandError> = None;
    for path in &options.files {
        match ScenarioFile::read(path) {
            Ok(file) => files.push(file),
            Err(error) => {
                if let Some(earlier) = failure.replace(error.into()) {
                    output::error(&earlier);
                }
            }
        }
    }
    failure.map_or(Ok(files), Err)
}

/// The report for people.
fn text(report: &CheckReport, quiet: bool, verbose: bool) -> String {
    let mut text = String::new();
    for file in &report.files {
        for case in &file.cases {
            if !quiet || case.status != CaseStatus::Ok {
                text += &case_text(&file.file.display().to_string(), case, verbose);
            }
        }
    }
    if !quiet {
        let cases = report.ok + report.failed + report.errors;
        text += &format!("{cases} case{}: {} ok", plural(cases), report.ok);
        if report.failed > 0 {
            text += &format!(", {} failed", report.failed);
        }
        if report.errors > 0 {
            text += &format!(", {} could not be run", report.errors);
        }
        text += "\n";
    }
    text
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

fn case_text(file: &str, case: &CaseReport, verbose: bool) -> String {
    let status = match case.status {
        CaseStatus::Ok => "ok",
        CaseStatus::Failed => "FAILED",
        CaseStatus::Error => "ERROR",
    };
    let mut text = format!(
        "{status:<6}  {}: {}\n",
        printable(file),
        printable(&case.name)
    );
    if let Some(error) = &case.error {
        text += &format!("        could not be run: {}\n", printable(error));
    }
    for finding in &case.expectations {
        if finding.holds && !verbose {
            continue;
        }
        let mark = if finding.holds {
            "holds:   "
        } else {
            "expected:"
        };
        text += &format!("        {mark} {}\n", printable(&finding.expected));
        text += &format!("        found:    {}\n", printable(&finding.found));
        let tensors = finding.shown_tensors();
        if !tensors.is_empty() {
            text += &format!("        tensors:  {}\n", printable(&tensors));
        }
    }
    text
}
