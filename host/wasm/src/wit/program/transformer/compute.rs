//! Checks operands, and has the device or the processor compute.

use std::num::NonZeroUsize;

use tightfit_kernels::KernelError;
use tightfit_kernels::decoder::{Faults, Operand, OperandShape, Operation};

use super::super::error::CallError;
use super::super::view::{Used, conflict, not_there};
use super::super::{ProgramCtx, ProgramCtxView};
use super::{Given, Source, told};
use crate::memory::Buffer;
use tightfit::device::{DeviceBytes, MOST_WORK, Queue, QueuedDecode};
use tightfit::plan::PartKind;

/// What the processor does before it is asked whether the program may go on, in bytes as
/// [`Operation::work`] counts them.
const WORK_OF_PIECE: u64 = 8 << 20;

/// What a device is given of one row at most: some tens of milliseconds.
const MOST_WORK_OF_ROW: u64 = 16 * MOST_WORK;

/// Multiplications that are worth a thread.
const WORK_OF_A_THREAD: usize = 1 << 18;

/// What was found wrong on a device.
#[derive(Debug, Default)]
pub(in super::super) struct DeviceFaults {
    /// By the processor.
    found: Faults,
    /// The word in which the device's kernels set bits.
    word: Option<Buffer>,
}

impl ProgramCtx {
    /// Returns the word in which a device's kernels say what was wrong. It is taken when it is first needed.
    fn fault_word(&mut self, queue: &dyn Queue, device: usize) -> Result<DeviceBytes, CallError> {
        let faults = self.faults.entry(device).or_default();
        if faults.word.is_none() {
            let index = u32::try_from(device).unwrap_or(u32::MAX);
            let word = self.memory.allocate(index, 4)?;
            let range = word.range(0, 4)?.ok_or_else(not_there)?;
            queue.give(&Given::Clear(range))?;
            faults.word = Some(word);
        }
        let word = faults.word.as_ref().map(|word| word.range(0, 4));
        word.transpose()?.flatten().ok_or_else(not_there)
    }

    /// Waits for a device, and returns what was wrong since this was last asked.
    pub(super) fn take_faults(&mut self, device: usize) -> Result<Faults, CallError> {
        let queue = self.memory.queue(device)?;
        if let Some(queue) = &queue {
            queue.finish()?;
        }
        let Some(faults) = self.faults.get_mut(&device) else {
            return Ok(Faults::NONE);
        };
        let mut found = std::mem::take(&mut faults.found);
        if let (Some(word), Some(queue)) = (&faults.word, queue) {
            let range = word.range(0, 4)?.ok_or_else(not_there)?;
            let mut bytes = [0; 4];
            queue.read(&range, &mut bytes)?;
            let more = Faults::from_bits(u32::from_le_bytes(bytes));
            if more.any() {
                queue.give(&Given::Clear(range))?;
                found = found.with(more);
            }
        }
        Ok(found)
    }
}

/// The bytes of some rows of an operand.
fn of_rows(shape: &OperandShape, first: usize, rows: usize) -> [u64; 2] {
    match shape.of_row {
        None => [0, shape.bytes() as u64],
        Some(elements) => {
            let of_row = (elements * shape.size) as u64;
            [first as u64 * of_row, rows as u64 * of_row]
        }
    }
}

/// Whether what is written of an operation's operands is read too, or not all of it is written.
fn updates(operation: &Operation) -> bool {
    matches!(
        operation,
        Operation::RmsNorm { .. } | Operation::Add { .. } | Operation::Rotate { .. }
    )
}

impl ProgramCtxView<'_> {
    /// Looks at an operation's operands, in the order of [`Operation::operands`], and computes it or has the device
    /// do so.
    pub(super) fn compute(
        &mut self,
        operation: &Operation,
        operands: &[Source<'_>],
    ) -> Result<(), CallError> {
        operation.check().map_err(told)?;
        let shapes = operation.operands();
        let places = shapes.iter().zip(operands);
        let places = places.filter_map(|(shape, source)| match source {
            Source::Parameter(_) => None,
            Source::Place(place) => {
                let used = Used {
                    place,
                    bytes: shape.bytes() as u64,
                    each: shape.align,
                    is_written: shape.is_written,
                };
                Some((shape.name, used))
            }
        });
        let (names, used): (Vec<_>, Vec<Used<'_>>) = places.unzip();
        for (used, name) in used.iter().zip(&names) {
            let buffer = self.table.get(&used.place.buffer)?;
            if let Err(error) = buffer.check(used.place.offset, used.bytes) {
                return Err(CallError::invalid(format_args!("{name}: {error}")));
            }
            if !used.is_aligned() {
                return Err(CallError::invalid(format_args!(
                    "{name} begins at byte {}, not at a multiple of {}",
                    used.place.offset, used.each
                )));
            }
        }
        let ranges: Vec<_> = used.iter().map(|used| (used.place, used.bytes)).collect();
        self.check(&ranges)?;
        if let Some((one, two)) = conflict(&used) {
            return Err(CallError::invalid(format_args!(
                "{} and {} overlap",
                names[one], names[two]
            )));
        }
        let Some(first) = used.first() else {
            return Ok(());
        };
        let device = self.table.get(&first.place.buffer)?.device();
        for source in operands {
            if let Source::Parameter(parameter) = source
                && parameter.device != device
            {
                return Err(CallError::invalid(format_args!(
                    "the tensor is on device {}, and the buffers on {device}",
                    parameter.device
                )));
            }
        }
        match self.context.memory.queue(device)? {
            Some(queue) => self.compute_on_device(&*queue, device, operation, operands),
            None => self.compute_on_host(device, operation, operands),
        }
    }

    fn compute_on_device(
        &mut self,
        queue: &dyn Queue,
        device: usize,
        operation: &Operation,
        operands: &[Source<'_>],
    ) -> Result<(), CallError> {
        let of_row = operation.with_rows(1).work();
        if of_row > MOST_WORK_OF_ROW {
            return Err(CallError::unsupported(
                "a single row of this is more than a device is given at once",
            ));
        }
        let shapes = operation.operands();
        let (all, work) = (operation.rows() as u64, operation.work());
        let at_once = match work {
            0..=MOST_WORK => all,
            // What belongs to all rows is counted in each piece.
            _ => (MOST_WORK / of_row).min(all),
        };
        self.in_pieces(all, at_once.clamp(1, 1 << 30), |view, first, rows| {
            let part = operation.with_rows(rows);
            let mut given = Vec::with_capacity(operands.len());
            let faults = match part.may_find_faults() {
                true => Some(view.context.fault_word(queue, device)?),
                false => None,
            };
            for (shape, source) in shapes.iter().zip(operands) {
                let [start, bytes] = of_rows(shape, first as usize, rows);
                given.push(match source {
                    Source::Parameter(parameter) => {
                        let tensor = parameter.loaded.model().tensor_at(parameter.tensor);
                        let tensor = tensor.ok_or_else(not_there)?;
                        tensor.device_bytes(PartKind::Data)?.ok_or_else(not_there)?
                    }
                    // Some range there is, of which nothing is used.
                    Source::Place(_) if bytes == 0 => {
                        let word = view.context.fault_word(queue, device)?;
                        word.slice(0, 0).ok_or_else(not_there)?
                    }
                    Source::Place(place) if shape.is_written && !updates(operation) => {
                        view.target(place, start, bytes)?
                    }
                    Source::Place(place) => view.source(place, start, bytes)?,
                });
            }
            let workspace = match queue.decode_workspace_bytes(&part) {
                0 => None,
                bytes => Some(view.context.scratch(queue, device, bytes)?),
            };
            queue.give(&Given::Decode(QueuedDecode {
                operation: part,
                operands: given,
                faults,
                workspace,
            }))?;
            view.wrote_all(&shapes, operands, first as usize, rows)
        })
    }

    /// Notes what was written.
    fn wrote_all(
        &mut self,
        shapes: &[OperandShape],
        operands: &[Source<'_>],
        first: usize,
        rows: usize,
    ) -> Result<(), CallError> {
        for (shape, source) in shapes.iter().zip(operands) {
            if let Source::Place(place) = source
                && shape.is_written
            {
                let [start, bytes] = of_rows(shape, first, rows);
                self.wrote(place, start + bytes)?;
            }
        }
        Ok(())
    }

    fn compute_on_host(
        &mut self,
        device: usize,
        operation: &Operation,
        operands: &[Source<'_>],
    ) -> Result<(), CallError> {
        let shapes = operation.operands();
        let all = operation.rows() as u64;
        let at_once = match operation {
            // They ask themselves, and do better with all rows.
            Operation::Dense { .. } | Operation::Attend { .. } => all,
            _ => WORK_OF_PIECE / operation.with_rows(1).work(),
        };
        self.in_pieces(all, at_once.clamp(1, 1 << 30), |view, first, rows| {
            let part = operation.with_rows(rows);
            for (shape, source) in shapes.iter().zip(operands) {
                let Source::Place(place) = source else {
                    continue;
                };
                let [start, bytes] = of_rows(shape, first as usize, rows);
                let until = match shape.is_written && !updates(operation) {
                    true => start,
                    false => start + bytes,
                };
                let buffer = view.table.get_mut(&place.buffer)?;
                buffer.clear_until(place.offset + until, &view.context.stop)?;
            }
            let found = view.run(&part, &shapes, operands, first as usize)?;
            let faults = view.context.faults.entry(device).or_default();
            faults.found = faults.found.with(found);
            view.wrote_all(&shapes, operands, first as usize, rows)
        })
    }

    /// Computes some rows in place.
    fn run(
        &self,
        part: &Operation,
        shapes: &[OperandShape],
        operands: &[Source<'_>],
        first: usize,
    ) -> Result<Faults, CallError> {
        let mut ranges = vec![];
        let mut parameters = vec![];
        for (shape, source) in shapes.iter().zip(operands) {
            let [start, bytes] = of_rows(shape, first, part.rows());
            match source {
                Source::Place(place) => {
                    let buffer = self.table.get(&place.buffer)?;
                    ranges.push((buffer, place.offset + start, bytes, shape.is_written));
                    parameters.push(None);
                }
                Source::Parameter(parameter) => {
                    let tensor = parameter.loaded.model().tensor_at(parameter.tensor);
                    let data = tensor.and_then(|tensor| tensor.part(PartKind::Data));
                    parameters.push(Some(data.ok_or_else(not_there)?));
                }
            }
        }
        let stop = &self.context.stop;
        let keep_on = || stop.check().is_ok();
        let multiplications = match part {
            Operation::Dense { lengths, .. } => {
                let lengths = lengths.iter().copied();
                lengths.fold(1, usize::saturating_mul)
            }
            _ => usize::MAX,
        };
        let threads = self.context.models.threads;
        let threads = threads.min(multiplications / WORK_OF_A_THREAD + 1);
        let threads = NonZeroUsize::new(threads).unwrap_or(NonZeroUsize::MIN);
        let done = Buffer::with_host(&ranges, |lent| {
            let mut lent = lent.into_iter();
            let all = parameters.into_iter().map(|parameter| match parameter {
                Some(data) => Some(Operand::Read(data)),
                None => lent.next(),
            });
            let all: Option<Vec<Operand<'_>>> = all.collect();
            let kernels = self.context.kernels;
            Some(kernels.decode_step(part, all?, threads, &keep_on))
        });
        let done: Result<Faults, KernelError> = done.flatten().ok_or_else(not_there)?;
        stop.check()?;
        done.map_err(told)
    }
}
