//! The interface `buffers`.

use wasmtime::component::Resource;

use super::ProgramCtxView;
use super::bindings::tightfit::host::buffers;
use super::error::CallError;
use super::view::{Used, list_bytes, place};
use crate::memory::Buffer;
use tightfit::device::Operation;

/// Bytes that a device copies in one go.
pub(super) const COPIED: u64 = 1 << 30;

impl buffers::Host for ProgramCtxView<'_> {}

impl buffers::HostBuffer for ProgramCtxView<'_> {
    fn allocate(&mut self, device: u32, bytes: u64) -> Result<Resource<Buffer>, CallError> {
        let (context, table) = self.begin()?;
        let buffer = context.memory.allocate(device, bytes)?;
        Ok(table.push(buffer)?)
    }

    fn length(&mut self, buffer: Resource<Buffer>) -> wasmtime::Result<u64> {
        let (_, table) = self.begin()?;
        Ok(table.get(&buffer)?.bytes())
    }

    fn device(&mut self, buffer: Resource<Buffer>) -> wasmtime::Result<u32> {
        let (_, table) = self.begin()?;
        Ok(u32::try_from(table.get(&buffer)?.device())?)
    }

    fn read(
        &mut self,
        buffer: Resource<Buffer>,
        offset: u64,
        bytes: u64,
    ) -> Result<Vec<u8>, CallError> {
        let (_, table) = self.begin()?;
        let buffer = table.get(&buffer)?;
        buffer.check(offset, bytes)?;
        let mut out = vec![0; list_bytes(bytes)?];
        buffer.read(offset, &mut out)?;
        Ok(out)
    }

    fn write(
        &mut self,
        buffer: Resource<Buffer>,
        offset: u64,
        bytes: Vec<u8>,
    ) -> Result<(), CallError> {
        let (context, table) = self.begin()?;
        list_bytes(bytes.len() as u64)?;
        let buffer = table.get_mut(&buffer)?;
        Ok(buffer.write(offset, &bytes, &context.stop)?)
    }

    fn copy_from(
        &mut self,
        target: Resource<Buffer>,
        offset: u64,
        source: Resource<Buffer>,
        source_offset: u64,
        bytes: u64,
    ) -> Result<(), CallError> {
        self.begin()?;
        let (to, from) = (place(target, offset), place(source, source_offset));
        self.check(&[(&from, bytes), (&to, bytes)])?;
        // Both ranges end within 64 bits.
        let overlap = offset < source_offset + bytes && source_offset < offset + bytes;
        if to.buffer.rep() == from.buffer.rep() && overlap && bytes > 0 {
            return Err(CallError::invalid("the ranges overlap"));
        }
        let used = [Used::read(&from, bytes, 1), Used::written(&to, bytes, 1)];
        if let Some(queue) = self.queue_for(&used)? {
            return self.in_pieces(bytes, COPIED, |view, start, length| {
                let source = view.source(&from, start, length as u64)?;
                let target = view.target(&to, start, length as u64)?;
                queue.give(&Operation::Copy { source, target })?;
                view.wrote(&to, start + length as u64)
            });
        }
        self.fill(&to, bytes, |view, start, piece| {
            view.fetch(&from, start, piece)
        })
    }

    fn drop(&mut self, buffer: Resource<Buffer>) -> wasmtime::Result<()> {
        self.table.delete(buffer)?;
        Ok(())
    }
}
