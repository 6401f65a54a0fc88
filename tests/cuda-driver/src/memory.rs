//! Memory of the devices: addresses, pages, and pages at addresses.

use std::ffi::c_void;

use crate::books::{Answer, Books, INVALID_DEVICE, INVALID_VALUE, Kind, OUT_OF_MEMORY, call};
use crate::streams::Work;

/// Reserved addresses.
#[derive(Debug)]
pub(crate) struct Range {
    pub(crate) len: u64,
    /// The pages that are mapped there.
    pub(crate) pages: Option<u64>,
    /// Whether the device may use them.
    pub(crate) access: bool,
    /// From `cuMemAlloc`.
    pub(crate) plain: bool,
}

/// Memory of a device.
pub(crate) struct Pages {
    pub(crate) device: usize,
    pub(crate) bytes: Vec<u8>,
    released: bool,
    mapped: bool,
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes of device {}", self.bytes.len(), self.device)
    }
}

/// `CUmemAllocationProp` and `CUmemAccessDesc` of cuda.h, as far as we look.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Properties {
    kind: i32,
    handle_types: i32,
    location: Location,
}

/// `CUmemLocation`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Location {
    kind: i32,
    id: i32,
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Access {
    location: Location,
    flags: i32,
}

impl Books {
    fn take_pages(&mut self, device: usize, len: u64) -> Result<u64, u32> {
        let stolen = std::mem::take(&mut self.setup.stolen);
        let hidden = self.setup.hidden;
        let gpu = self.devices.get_mut(device).ok_or(INVALID_DEVICE)?;
        gpu.taken += stolen;
        if len > gpu.free().saturating_sub(hidden) {
            return Err(OUT_OF_MEMORY);
        }
        gpu.used += len;
        self.peaks[device] = self.peaks[device].max(gpu.used);
        let handle = self.handle();
        let pages = Pages {
            device,
            // Nobody may count on what is in fresh memory.
            bytes: vec![0xcd; len as usize],
            released: false,
            mapped: false,
        };
        self.pages.insert(handle, pages);
        Ok(handle)
    }

    /// Frees pages that nobody has a handle of or addresses for.
    fn drop_unused(&mut self, handle: u64) {
        let Some(pages) = self.pages.get(&handle) else {
            return;
        };
        if pages.released && !pages.mapped {
            self.devices[pages.device].used -= pages.bytes.len() as u64;
            self.pages.remove(&handle);
        }
    }

    /// The pages and the position in them of `len` bytes at `address`.
    pub(crate) fn find(
        &mut self,
        call: &str,
        address: u64,
        len: usize,
    ) -> Result<(u64, usize), u32> {
        let end = address.saturating_add(len as u64);
        let found = self.ranges.range(..=address).next_back();
        let found = found.filter(|(start, range)| end <= *start + range.len);
        match found {
            Some((start, range)) if range.access => match range.pages {
                Some(pages) => Ok((pages, (address - start) as usize)),
                None => Err(self.fault(format!("{call} where nothing is mapped"))),
            },
            Some(_) => Err(self.fault(format!("{call} where access is not set"))),
            None => Err(self.fault(format!("{call} out of bounds: {len} bytes at {address:#x}"))),
        }
    }

    /// The same where the memory has to be that of a device.
    pub(crate) fn find_on(
        &mut self,
        call: &str,
        device: usize,
        address: u64,
        len: usize,
    ) -> Answer {
        let (pages, _) = self.find(call, address, len)?;
        if self.pages[&pages].device != device {
            return Err(self.fault(format!("{call} under another context")));
        }
        Ok(())
    }

    fn unmap(&mut self, call: &str, address: u64) -> Result<(), u32> {
        let Some(range) = self.ranges.get(&address) else {
            return Err(self.fault(format!("{call} of addresses that are not reserved")));
        };
        let end = address + range.len;
        if self.is_used(address, end) {
            self.fault(format!("{call} while something is done there"));
        }
        let Some(handle) = self
            .ranges
            .get_mut(&address)
            .and_then(|range| range.pages.take())
        else {
            return Err(self.fault(format!("{call} where nothing is mapped")));
        };
        if let Some(pages) = self.pages.get_mut(&handle) {
            pages.mapped = false;
        }
        self.drop_unused(handle);
        Ok(())
    }

    fn multiple(&mut self, call: &str, len: usize) -> Result<(), u32> {
        if len == 0 || !(len as u64).is_multiple_of(self.setup.granularity) {
            return Err(self.fault(format!(
                "{call} of {len} bytes, no multiple of the granularity"
            )));
        }
        Ok(())
    }
}

/// `cuMemAddressReserve`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAddressReserve(
    out: *mut u64,
    len: usize,
    _: usize,
    _: u64,
    _: u64,
) -> u32 {
    call("cuMemAddressReserve", Kind::Takes, |books| {
        books.multiple("cuMemAddressReserve", len)?;
        let address = books.address(len as u64);
        let range = Range {
            len: len as u64,
            pages: None,
            access: false,
            plain: false,
        };
        books.ranges.insert(address, range);
        // SAFETY: the caller's pointer to the result.
        unsafe { out.write(address) };
        Ok(())
    })
}

/// `cuMemAddressFree`.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemAddressFree(address: u64, len: usize) -> u32 {
    call("cuMemAddressFree", Kind::GivesBack, |books| {
        match books.ranges.get(&address) {
            Some(range) if range.len == len as u64 && range.pages.is_none() && !range.plain => {
                books.ranges.remove(&address);
                Ok(())
            }
            other => {
                let text = format!("cuMemAddressFree of {len} bytes of {other:?}");
                Err(books.fault(text))
            }
        }
    })
}

/// `cuMemCreate`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemCreate(
    out: *mut u64,
    len: usize,
    properties: *const Properties,
    _: u64,
) -> u32 {
    call("cuMemCreate", Kind::Takes, |books| {
        books.multiple("cuMemCreate", len)?;
        // SAFETY: the caller's pointer to properties.
        let properties = unsafe { properties.read() };
        if (
            properties.kind,
            properties.handle_types,
            properties.location.kind,
        ) != (1, 0, 1)
        {
            return Err(books.fault(format!("cuMemCreate of {properties:?}")));
        }
        let device = usize::try_from(properties.location.id).map_err(|_| INVALID_DEVICE)?;
        let handle = books.take_pages(device, len as u64)?;
        // SAFETY: the caller's pointer to the result.
        unsafe { out.write(handle) };
        Ok(())
    })
}

/// `cuMemRelease`.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemRelease(handle: u64) -> u32 {
    call("cuMemRelease", Kind::GivesBack, |books| {
        match books.pages.get_mut(&handle) {
            Some(pages) if !pages.released => pages.released = true,
            _ => return Err(books.fault("cuMemRelease of what is not there".to_owned())),
        }
        books.drop_unused(handle);
        Ok(())
    })
}

/// `cuMemMap`.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemMap(address: u64, len: usize, offset: usize, handle: u64, _: u64) -> u32 {
    call("cuMemMap", Kind::Takes, |books| {
        let range = books.ranges.get_mut(&address);
        let range = range.filter(|range| range.len == len as u64 && range.pages.is_none());
        let pages = books.pages.get_mut(&handle);
        let pages = pages.filter(|pages| pages.bytes.len() == len && !pages.mapped && offset == 0);
        let (Some(range), Some(pages)) = (range, pages) else {
            return Err(books.fault("cuMemMap of what does not belong together".to_owned()));
        };
        range.pages = Some(handle);
        pages.mapped = true;
        Ok(())
    })
}

/// `cuMemUnmap`.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemUnmap(address: u64, len: usize) -> u32 {
    call("cuMemUnmap", Kind::GivesBack, |books| {
        if books
            .ranges
            .get(&address)
            .is_none_or(|range| range.len != len as u64)
        {
            return Err(books.fault("cuMemUnmap of other than what was mapped".to_owned()));
        }
        books.unmap("cuMemUnmap", address)
    })
}

/// `cuMemSetAccess`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemSetAccess(
    address: u64,
    len: usize,
    access: *const Access,
    count: usize,
) -> u32 {
    call("cuMemSetAccess", Kind::Takes, |books| {
        // SAFETY: the caller's pointer to at least one description.
        let access = unsafe { access.read() };
        let range = books.ranges.get(&address);
        let device = range
            .filter(|range| range.len == len as u64)
            .and_then(|range| Some(books.pages.get(&range.pages?)?.device as i32));
        if count != 1 || access.flags != 3 || device != Some(access.location.id) {
            return Err(books.fault(format!("cuMemSetAccess of {access:?}")));
        }
        if let Some(range) = books.ranges.get_mut(&address) {
            range.access = true;
        }
        Ok(())
    })
}

/// `cuMemAlloc_v2`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(out: *mut u64, len: usize) -> u32 {
    call("cuMemAlloc", Kind::Takes, |books| {
        let device = books.current("cuMemAlloc")?;
        if len == 0 {
            return Err(INVALID_VALUE);
        }
        let handle = books.take_pages(device, len as u64)?;
        if let Some(pages) = books.pages.get_mut(&handle) {
            (pages.released, pages.mapped) = (true, true);
        }
        let address = books.address(len as u64);
        let range = Range {
            len: len as u64,
            pages: Some(handle),
            access: true,
            plain: true,
        };
        books.ranges.insert(address, range);
        // SAFETY: the caller's pointer to the result.
        unsafe { out.write(address) };
        Ok(())
    })
}

/// `cuMemFree_v2`.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: u64) -> u32 {
    call("cuMemFree", Kind::GivesBack, |books| {
        books.current("cuMemFree")?;
        if books.ranges.get(&address).is_none_or(|range| !range.plain) {
            return Err(books.fault("cuMemFree of what was not allocated".to_owned()));
        }
        books.unmap("cuMemFree", address)?;
        books.ranges.remove(&address);
        Ok(())
    })
}

/// `cuMemGetInfo_v2`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> u32 {
    call("cuMemGetInfo", Kind::Takes, |books| {
        let device = books.current("cuMemGetInfo")?;
        let gpu = &books.devices[device];
        // SAFETY: the caller's pointers to the results.
        unsafe {
            free.write(gpu.free() as usize);
            total.write(gpu.total as usize);
        }
        Ok(())
    })
}

/// `cuMemGetAllocationGranularity`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetAllocationGranularity(
    out: *mut usize,
    _: *const Properties,
    _: u32,
) -> u32 {
    call("cuMemGetAllocationGranularity", Kind::Takes, |books| {
        // SAFETY: the caller's pointer to the result.
        unsafe { out.write(books.setup.granularity as usize) };
        Ok(())
    })
}

/// `cuMemcpyDtoH_v2`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, len: usize) -> u32 {
    call("cuMemcpyDtoH", Kind::Takes, |books| {
        let device = books.current("cuMemcpyDtoH")?;
        if books.default_stream_is_barred(device) {
            return Err(books.fault("cuMemcpyDtoH that would end a capture".to_owned()));
        }
        if books.is_used(from, from.saturating_add(len as u64)) {
            books.fault("cuMemcpyDtoH of what is still being worked on".to_owned());
        }
        let (pages, position) = books.find("cuMemcpyDtoH", from, len)?;
        let bytes = &books.pages[&pages].bytes[position..position + len];
        // SAFETY: the caller's memory of `len` bytes; ours lie elsewhere.
        unsafe { to.cast::<u8>().copy_from(bytes.as_ptr(), len) };
        Ok(())
    })
}

/// `cuMemcpyDtoHAsync_v2`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    from: u64,
    len: usize,
    stream: u64,
) -> u32 {
    call("cuMemcpyDtoHAsync", Kind::Takes, |books| {
        let device = books.current("cuMemcpyDtoHAsync")?;
        books.find("cuMemcpyDtoHAsync", from, len)?;
        let to = to.expose_provenance();
        books.give(
            "cuMemcpyDtoHAsync",
            device,
            stream,
            Work::Fetch { to, from, len },
        )
    })
}
