//! Formats that a program has chosen tensor by tensor.

use super::*;
use crate::checkpoint::Checkpoint;
use crate::policy::{Answer, Description, Policy, PolicyError, Request};
use crate::testing::{device, source, write_checkpoint};
use crate::types::DType;

/// Puts everything on the first device as stored, but for what is required.
struct AsRequired;

impl Policy for AsRequired {
    fn describe(&self) -> Result<Description, PolicyError> {
        Ok(Description {
            name: "as-required".into(),
            version: "1".into(),
            settings: vec![],
        })
    }

    fn plan(&self, request: &Request<'_>) -> Result<Answer, PolicyError> {
        let mut placements = vec![
            Placement {
                device: Some(0),
                format: Format::Stored,
            };
            request.tensors.len()
        ];
        let mut before = None;
        for &(tensor, format) in request.required_formats {
            assert!(before < Some(tensor), "ascending, each once");
            before = Some(tensor);
            placements[tensor].format = format;
        }
        Ok(Answer {
            proposal: Proposal {
                placements,
                headroom: vec![0],
                slices: Vec::new(),
            },
            fuel: None,
        })
    }
}

fn formats(
    formats: Vec<(usize, Format)>,
    settings: &[(String, String)],
) -> Result<Vec<Format>, ProposeError> {
    let directory = tempfile::tempdir().unwrap();
    let names = ["a.weight", "b.weight", "c.weight"];
    let sources = names.map(|name| source(name, DType::Bf16, &[64, 64]));
    write_checkpoint(directory.path(), &sources);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let options = PlanOptions::default().with_formats(formats);
    let devices = [device("sim:0", 1 << 30, 1)];
    let proposed = propose_with(&checkpoint, &AsRequired, &devices, settings, &options)?;
    let tensors = proposed.plan.tensors.iter();
    Ok(tensors.map(|tensor| tensor.placement.format).collect())
}

#[test]
fn formats_of_single_tensors_hold_over_policy_and_rules() {
    let f32 = Format::Cast(DType::F32);
    let given = vec![(2, Format::NF4), (0, f32), (2, Format::NF4_DOUBLE)];
    assert_eq!(
        formats(given.clone(), &[]).unwrap(),
        [f32, Format::Stored, Format::NF4_DOUBLE]
    );
    let rules = [("format:*".to_owned(), "f16".to_owned())];
    assert_eq!(
        formats(given, &rules).unwrap(),
        [f32, Format::Cast(DType::F16), Format::NF4_DOUBLE]
    );
}

#[test]
fn formats_that_cannot_be_are_the_callers_fault() {
    let error = formats(vec![(3, Format::NF4)], &[]).unwrap_err();
    assert!(
        matches!(
            error,
            ProposeError::NoSuchTensor {
                index: 3,
                tensors: 3
            }
        ),
        "{error:?}"
    );
    let error = formats(vec![(1, Format::Cast(DType::I64))], &[]).unwrap_err();
    assert!(
        matches!(&error, ProposeError::IllegalFormat { tensor, .. } if tensor == "b.weight"),
        "{error:?}"
    );
}
