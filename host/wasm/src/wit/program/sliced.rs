//! The interface `sliced-models`.

use wasmtime::component::Resource;

use super::ProgramCtxView;
use super::bindings::tightfit::host::{sliced_models, types};
use super::checkpoints::OpenCheckpoint;
use super::error::CallError;
use super::models::LoadedModel;
use crate::wit::bindings::slicing::tightfit::host::slices;
use crate::wit::convert;
use tightfit::policy::Proposal;

impl sliced_models::Host for ProgramCtxView<'_> {
    fn load(
        &mut self,
        checkpoint: Resource<OpenCheckpoint>,
        placements: Vec<types::Placement>,
        slices: Vec<slices::Slice>,
        headroom: Vec<u64>,
    ) -> Result<Resource<LoadedModel>, CallError> {
        let (context, table) = self.begin()?;
        let OpenCheckpoint(checkpoint) = table.get(&checkpoint)?;
        let tensors = checkpoint.tensors();
        let proposal = Proposal {
            placements: convert::placements(placements, tensors, |_| false)
                .map_err(CallError::invalid)?,
            headroom,
            slices: convert::slices(slices, tensors, |_| false).map_err(CallError::invalid)?,
        };
        let model = context.load(checkpoint, &proposal)?;
        Ok(table.push(model)?)
    }

    fn get_piece(
        &mut self,
        model: Resource<LoadedModel>,
        tensor: u32,
    ) -> Result<Option<sliced_models::Piece>, CallError> {
        let (_, table) = self.begin()?;
        let piece = table.get(&model)?.tensor(tensor)?.piece();
        Ok(piece.map(|piece| sliced_models::Piece {
            tensor: piece.of.clone(),
            shape: piece.shape.clone(),
            dimension: convert::index(piece.dimension),
            ranges: piece
                .ranges
                .iter()
                .map(|range| slices::Range {
                    start: range.start,
                    end: range.end,
                })
                .collect(),
        }))
    }
}
