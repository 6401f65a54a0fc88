//! The interface `buffers`.

use wasmtime::component::Resource;

use super::bindings::tightfit::host::buffers;
use super::buffer::{Buffer, PIECE};
use super::error::CallError;
use super::{ProgramContextView, list_bytes};

impl buffers::Host for ProgramContextView<'_> {}

impl buffers::HostBuffer for ProgramContextView<'_> {
    fn allocate(&mut self, device: u32, bytes: u64) -> Result<Resource<Buffer>, CallError> {
        self.context.stop.check()?;
        let buffer = self.context.memory.allocate(device, bytes)?;
        Ok(self.table.push(buffer)?)
    }

    fn length(&mut self, buffer: Resource<Buffer>) -> wasmtime::Result<u64> {
        Ok(self.table.get(&buffer)?.bytes())
    }

    fn device(&mut self, buffer: Resource<Buffer>) -> wasmtime::Result<u32> {
        Ok(u32::try_from(self.table.get(&buffer)?.device())?)
    }

    fn read(
        &mut self,
        buffer: Resource<Buffer>,
        offset: u64,
        bytes: u64,
    ) -> Result<Vec<u8>, CallError> {
        self.context.stop.check()?;
        let buffer = self.table.get(&buffer)?;
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
        self.context.stop.check()?;
        list_bytes(bytes.len() as u64)?;
        let buffer = self.table.get_mut(&buffer)?;
        Ok(buffer.write(offset, &bytes, &self.context.stop)?)
    }

    fn copy_from(
        &mut self,
        target: Resource<Buffer>,
        offset: u64,
        source: Resource<Buffer>,
        source_offset: u64,
        bytes: u64,
    ) -> Result<(), CallError> {
        self.context.stop.check()?;
        let (to, from) = (self.table.get(&target)?, self.table.get(&source)?);
        from.check(source_offset, bytes)?;
        to.check(offset, bytes)?;
        if to.device() != from.device() {
            return Err(CallError::invalid(format_args!(
                "the buffers are on devices {} and {}, not on one",
                from.device(),
                to.device()
            )));
        }
        // Both ranges end within 64 bits.
        let overlap = offset < source_offset + bytes && source_offset < offset + bytes;
        if target.rep() == source.rep() && overlap && bytes > 0 {
            return Err(CallError::invalid("the ranges overlap"));
        }
        let mut piece = vec![0; bytes.min(PIECE as u64) as usize];
        let mut done = 0;
        while done < bytes {
            self.context.stop.check()?;
            let length = (bytes - done).min(PIECE as u64);
            let piece = &mut piece[..length as usize];
            self.table.get(&source)?.read(source_offset + done, piece)?;
            let to = self.table.get_mut(&target)?;
            to.write(offset + done, piece, &self.context.stop)?;
            done += length;
        }
        Ok(())
    }

    fn drop(&mut self, buffer: Resource<Buffer>) -> wasmtime::Result<()> {
        self.table.delete(buffer)?;
        Ok(())
    }
}
