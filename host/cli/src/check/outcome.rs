//! What came of running scenarios. The JSON form is a promise to other programs, as that of other
//! reports: fields are added, not changed, while `schema` is 1.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

/// What came of all files.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CheckReport {
    /// Version of this form.
    pub schema: u32,
    /// Cases of which every expectation holds.
    pub ok: usize,
    /// Cases of which some expectation does not hold.
    pub failed: usize,
    /// Cases that could not be run.
    pub errors: usize,
    /// The files, in the order given.
    pub files: Vec<FileReport>,
}

impl CheckReport {
    /// Counts the cases of `files`.
    pub fn new(files: Vec<FileReport>) -> CheckReport {
        let count = |status| files.iter().map(|file| file.count(status)).sum();
        CheckReport {
            schema: 1,
            ok: count(CaseStatus::Ok),
            failed: count(CaseStatus::Failed),
            errors: count(CaseStatus::Error),
            files,
        }
    }

    /// Returns whether everything holds.
    pub fn holds(&self) -> bool {
        self.failed == 0 && self.errors == 0
    }
}

/// What came of one file.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FileReport {
    /// The file.
    pub file: PathBuf,
    /// Its cases.
    pub cases: Vec<CaseReport>,
}

impl FileReport {
    /// Returns how many of its cases ended so.
    pub fn count(&self, status: CaseStatus) -> usize {
        self.cases
            .iter()
            .filter(|case| case.status == status)
            .count()
    }
}

/// How a case ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CaseStatus {
    /// Every expectation holds.
    Ok,
    /// Some do not.
    Failed,
    /// It could not be run.
    Error,
}

/// What came of one case.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CaseReport {
    /// Its name.
    pub name: String,
    /// The policy, as the file names it.
    pub policy: String,
    /// The settings given.
    pub settings: BTreeMap<String, String>,
    /// How it ended.
    pub status: CaseStatus,
    /// Why it could not be run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Every expectation, in the order in which they are judged.
    pub expectations: Vec<Finding>,
    /// Seconds it took.
    pub seconds: f64,
}

/// What came of one expectation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Whether it holds.
    pub holds: bool,
    /// What was expected.
    pub expected: String,
    /// What was found.
    pub found: String,
    /// The tensors that are not as expected, the first few.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tensors: Vec<String>,
    /// How many there are in all.
    #[serde(skip_serializing_if = "is_zero")]
    pub tensor_count: usize,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// Tensors that a finding names; the others are counted.
const NAMED: usize = 5;

impl Finding {
    pub(super) fn new(
        holds: bool,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Finding {
        Finding {
            holds,
            expected: expected.into(),
            found: found.into(),
            tensors: Vec::new(),
            tensor_count: 0,
        }
    }

    /// Adds the tensors that are not as expected.
    pub(super) fn with_tensors(mut self, names: &[&str]) -> Finding {
        self.tensors = names
            .iter()
            .take(NAMED)
            .map(|&name| name.to_owned())
            .collect();
        self.tensor_count = names.len();
        self
    }

    /// Returns the tensors concerned as a sentence's end: a few by name, then a count. Empty
    /// without any.
    pub fn shown_tensors(&self) -> String {
        let mut text = self.tensors.join(", ");
        let more = self.tensor_count.saturating_sub(self.tensors.len());
        if more > 0 {
            text += &format!(" and {more} more");
        }
        text
    }
}
