//! Memory of a device.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys;
use sys::{CUdeviceptr, CUmemAccessDesc, CUmemGenericAllocationHandle};

use super::stream::Stream;
use super::{Context, twice};
use crate::device::DeviceError;

/// How much is read from a device at once: the driver copies through buffers of its own anyway.
const READ: usize = 16 << 20;

/// Memory of a device in one piece. Given back when dropped.
#[derive(Debug)]
pub(in crate::device::cuda) struct DeviceMemory {
    context: Arc<Context>,
    address: CUdeviceptr,
    len: usize,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// Addresses with pages mapped there.
    Virtual {
        pages: Option<CUmemGenericAllocationHandle>,
        mapped: bool,
    },
    /// From the driver's allocator.
    Plain,
}

impl DeviceMemory {
    /// Takes `len` bytes, more than none and a multiple of the granularity, through the interface
    /// for virtual memory: the driver's own allocator rounds to what it likes.
    pub(in crate::device::cuda) fn take_virtual(
        context: &Arc<Context>,
        len: usize,
    ) -> Result<DeviceMemory, DeviceError> {
        let api = context.api;
        let _current = context.enter()?;
        let _beside = context.beside_captures()?;
        let mut address = 0;
        // SAFETY: `address` outlives the call.
        let code = unsafe { (api.cuMemAddressReserve)(&raw mut address, len, 0, 0, 0) };
        context.check("cuMemAddressReserve", len as u64, code)?;
        // From here on its destructor undoes what has been done.
        let mut memory = DeviceMemory {
            context: Arc::clone(context),
            address,
            len,
            kind: Kind::Virtual {
                pages: None,
                mapped: false,
            },
        };
        let properties = context.properties();
        let mut handle = 0;
        // SAFETY: `handle` and `properties` outlive the call.
        let code = unsafe { (api.cuMemCreate)(&raw mut handle, len, &raw const properties, 0) };
        context.check("cuMemCreate", len as u64, code)?;
        memory.kind = Kind::Virtual {
            pages: Some(handle),
            mapped: false,
        };
        // SAFETY: the addresses are ours, as long as the pages, and nothing is mapped there.
        let code = unsafe { (api.cuMemMap)(address, len, 0, handle, 0) };
        context.check("cuMemMap", len as u64, code)?;
        memory.kind = Kind::Virtual {
            pages: Some(handle),
            mapped: true,
        };
        let access = CUmemAccessDesc {
            location: context.location(),
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: one description, which outlives the call; the addresses are ours and mapped.
        let code = unsafe { (api.cuMemSetAccess)(address, len, &raw const access, 1) };
        context.check("cuMemSetAccess", len as u64, code)?;
        Ok(memory)
    }

    /// Takes `len` bytes, more than none, from the driver's allocator.
    pub(in crate::device::cuda) fn take_plain(
        context: &Arc<Context>,
        len: usize,
    ) -> Result<DeviceMemory, DeviceError> {
        let _current = context.enter()?;
        let _beside = context.beside_captures()?;
        let mut address = 0;
        // SAFETY: `address` outlives the call; the context is current.
        let code = unsafe { (context.api.cuMemAlloc_v2)(&raw mut address, len) };
        context.check("cuMemAlloc", len as u64, code)?;
        Ok(DeviceMemory {
            context: Arc::clone(context),
            address,
            len,
            kind: Kind::Plain,
        })
    }

    pub(in crate::device::cuda) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Its first byte, as the device counts.
    pub(in crate::device::cuda) fn address(&self) -> u64 {
        self.address
    }

    /// Its length in bytes.
    pub(in crate::device::cuda) fn len(&self) -> u64 {
        self.len as u64
    }

    /// The address of `len` bytes at `offset`, which lie inside.
    pub(super) fn at(&self, offset: u64, len: usize) -> Result<CUdeviceptr, DeviceError> {
        let end = offset.saturating_add(len as u64);
        if end > self.len as u64 {
            return Err(DeviceError::OutOfBounds {
                device: self.context.name().to_owned(),
                offset,
                end,
                len: self.len as u64,
            });
        }
        Ok(self.address + offset)
    }

    /// Copies `out.len()` bytes from `offset`, after what the default stream was given, unless a stream that waits for
    /// that one is recorded by somebody.
    pub(in crate::device::cuda) fn read(
        &self,
        offset: u64,
        out: &mut [u8],
    ) -> Result<(), DeviceError> {
        let mut from = self.at(offset, out.len())?;
        let _current = self.context.enter()?;
        let _beside = self.context.beside_captures()?;
        if self.context.default_stream_is_barred()? {
            return self.read_apart(from, out);
        }
        for piece in out.chunks_mut(READ) {
            let target = piece.as_mut_ptr().cast::<c_void>();
            // SAFETY: `piece` is ours for the whole call, which returns when it is written; as many
            // bytes at `from` lie inside this memory.
            let code = unsafe { (self.context.api.cuMemcpyDtoH_v2)(target, from, piece.len()) };
            self.context
                .check("cuMemcpyDtoH", piece.len() as u64, code)?;
            from += piece.len() as u64;
        }
        Ok(())
    }

    /// The same in a stream that waits for no other. As many bytes at `from` lie inside; the context is current.
    fn read_apart(&self, mut from: CUdeviceptr, out: &mut [u8]) -> Result<(), DeviceError> {
        let context = &self.context;
        let stream = Stream::new(context)?;
        for piece in out.chunks_mut(READ) {
            let target = piece.as_mut_ptr().cast::<c_void>();
            // SAFETY: `piece` is ours until the stream is done, below; as many bytes at `from` lie inside this
            // memory.
            let code = unsafe {
                (context.api.cuMemcpyDtoHAsync_v2)(target, from, piece.len(), stream.raw)
            };
            let result = context.check("cuMemcpyDtoHAsync", piece.len() as u64, code);
            finish(&stream, result)?;
            from += piece.len() as u64;
        }
        Ok(())
    }

    /// Sets `len` bytes from `offset` to zero.
    pub(in crate::device::cuda) fn clear(
        &self,
        offset: u64,
        len: usize,
    ) -> Result<(), DeviceError> {
        let address = self.at(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let context = &self.context;
        let stream = Stream::new(context)?;
        let _current = context.enter()?;
        // SAFETY: the bytes lie inside this memory, which is kept until the stream is done, below.
        let code = unsafe { (context.api.cuMemsetD8Async)(address, 0, len, stream.raw) };
        finish(&stream, context.check("cuMemsetD8Async", len as u64, code))
    }
}

/// Waits for a stream that is then given up, whether or not it took what it was given last.
fn finish(stream: &Stream, given: Result<(), DeviceError>) -> Result<(), DeviceError> {
    given.and(stream.synchronize()).inspect_err(|_| {
        // Once more: an error that passes is no end of its work.
        if let Err(error) = stream.synchronize() {
            tracing::warn!("{error}");
        }
    })
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let (api, context) = (self.context.api, &self.context);
        // Without a current context the driver refuses what needs one.
        let _current = twice(|| context.enter());
        let _beside = context.beside_captures();
        match self.kind {
            Kind::Virtual { pages, mapped } => {
                if mapped {
                    // SAFETY: mapped by us. Whoever copies to it holds it, so nobody does.
                    let code = unsafe { (api.cuMemUnmap)(self.address, self.len) };
                    context.check_release("cuMemUnmap", code);
                }
                if let Some(pages) = pages {
                    // SAFETY: created by us and released once.
                    let code = unsafe { (api.cuMemRelease)(pages) };
                    context.check_release("cuMemRelease", code);
                }
                // SAFETY: reserved by us, with nothing mapped there any more.
                let code = unsafe { (api.cuMemAddressFree)(self.address, self.len) };
                context.check_release("cuMemAddressFree", code);
            }
            Kind::Plain => {
                // SAFETY: allocated by us and freed once; nobody copies to it, as above.
                let code = unsafe { (api.cuMemFree_v2)(self.address) };
                context.check_release("cuMemFree", code);
            }
        }
    }
}
