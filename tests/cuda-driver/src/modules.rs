//! Modules and their functions, and launches of these.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_void};

use tightfit_kernels::cuda::{self, KERNELS, PTX, decoder, experts, linear};

use crate::books::{Books, Kind, UNSUPPORTED_PTX_VERSION, call};
use crate::kernels::{Parameters, Shape, arguments};
use crate::products;
use crate::streams::Work;

/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
const MAX_DYNAMIC_SHARED: u32 = 8;
/// Dynamic shared memory that a launch may have without asking.
const UNASKED_SHARED: u32 = 48 << 10;
/// What it can have at all on such a device.
const MOST_SHARED: u32 = 227 << 10;

/// What has been loaded.
#[derive(Debug, Default)]
pub(crate) struct Modules {
    /// The device of each, by handle.
    pub(crate) loaded: HashMap<u64, usize>,
    /// What is in each, by handle.
    contents: HashMap<u64, Contents>,
    /// Module and kernel, by handle.
    functions: HashMap<u64, (u64, &'static str)>,
    /// Dynamic shared memory that has been asked for, by function.
    shared: HashMap<u64, u32>,
}

/// Which of our modules an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contents {
    Quantizing,
    Products,
    Decoder,
    Experts,
}

/// # Safety
/// The image is machine code, whole, or text that ends in a zero.
unsafe fn contents_of(image: *const c_void) -> Option<Contents> {
    let capability = products::GPU.compute_capability;
    let mut ours = [
        (cuda::module(capability).ok()?, Contents::Quantizing),
        (linear::module(capability).ok()?, Contents::Products),
        (decoder::module(capability).ok()?, Contents::Decoder),
        (experts::module(capability).ok()?, Contents::Experts),
    ];
    // SAFETY: machine code or text, both of more than four bytes.
    if unsafe { image.cast::<[u8; 4]>().read_unaligned() } != *b"\x7fELF" {
        // SAFETY: as the caller promises.
        let text = unsafe { CStr::from_ptr(image.cast::<c_char>()) };
        return (text.to_bytes() == PTX.as_bytes()).then_some(Contents::Quantizing);
    }
    // Not more than is there is compared: there is no machine code but ours.
    ours.sort_by_key(|(code, _)| code.len());
    let found = ours.iter().find(|(code, _)| {
        // SAFETY: what is not the shorter one is the longer one.
        let image = unsafe { std::slice::from_raw_parts(image.cast::<u8>(), code.len()) };
        image == code
    });
    found.map(|(_, contents)| *contents)
}

/// `cuModuleLoadData`. It knows no modules but ours.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(out: *mut u64, image: *const c_void) -> u32 {
    call("cuModuleLoadData", Kind::Takes, |books| {
        let device = books.current("cuModuleLoadData")?;
        // SAFETY: as the caller promises.
        let Some(contents) = (unsafe { contents_of(image) }) else {
            return Err(books.fault("cuModuleLoadData of other than our kernels".to_owned()));
        };
        if books.setup.refuses_modules {
            return Err(UNSUPPORTED_PTX_VERSION);
        }
        let handle = books.handle();
        books.modules.loaded.insert(handle, device);
        books.modules.contents.insert(handle, contents);
        // SAFETY: the caller's pointer to the result.
        unsafe { out.write(handle) };
        Ok(())
    })
}

/// `cuModuleUnload`.
#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(module: u64) -> u32 {
    call("cuModuleUnload", Kind::GivesBack, |books| {
        let device = books.current("cuModuleUnload")?;
        match books.modules.loaded.remove(&module) {
            None => return Err(books.fault("cuModuleUnload of what is not there".to_owned())),
            Some(other) if other != device => {
                books.fault("cuModuleUnload under another context".to_owned());
            }
            Some(_) => {}
        }
        if books.runs(module) {
            books.fault("cuModuleUnload while its kernels run".to_owned());
        }
        let functions = &mut books.modules.functions;
        functions.retain(|_, (of, _)| *of != module);
        let functions = &books.modules.functions;
        let shared = &mut books.modules.shared;
        shared.retain(|function, _| functions.contains_key(function));
        books.modules.contents.remove(&module);
        Ok(())
    })
}

/// `cuModuleGetFunction`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    out: *mut u64,
    module: u64,
    name: *const c_char,
) -> u32 {
    call("cuModuleGetFunction", Kind::Takes, |books| {
        let device = books.current("cuModuleGetFunction")?;
        if books.modules.loaded.get(&module) != Some(&device) {
            return Err(books.fault("cuModuleGetFunction of what is not there".to_owned()));
        }
        // SAFETY: the caller's text that ends in a zero.
        let name = unsafe { CStr::from_ptr(name) };
        let has = |kernel: &&str| kernel.as_bytes() == name.to_bytes();
        let named = |kernels: Vec<(&'static str, u32)>| {
            let mut names = kernels.into_iter().map(|(kernel, _)| kernel);
            names.find(has)
        };
        let kernel = match books.modules.contents.get(&module) {
            Some(Contents::Products) => named(products::kernels()),
            Some(Contents::Experts) => named(crate::experts::kernels()),
            Some(Contents::Decoder) => decoder::KERNELS.into_iter().find(has),
            _ => KERNELS.iter().copied().find(has),
        };
        let Some(kernel) = kernel else {
            return Err(books.fault(format!("cuModuleGetFunction of {name:?}")));
        };
        let handle = books.handle();
        books.modules.functions.insert(handle, (module, kernel));
        // SAFETY: the caller's pointer to the result.
        unsafe { out.write(handle) };
        Ok(())
    })
}

/// `cuFuncSetAttribute`.
#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetAttribute(function: u64, attribute: u32, value: i32) -> u32 {
    call("cuFuncSetAttribute", Kind::Takes, |books| {
        books.current("cuFuncSetAttribute")?;
        let value = u32::try_from(value).unwrap_or(u32::MAX);
        if !books.modules.functions.contains_key(&function) {
            return Err(books.fault("cuFuncSetAttribute of what is not there".to_owned()));
        }
        if attribute != MAX_DYNAMIC_SHARED || value > MOST_SHARED {
            return Err(books.fault(format!("cuFuncSetAttribute {attribute} to {value}")));
        }
        books.modules.shared.insert(function, value);
        Ok(())
    })
}

/// `cuLaunchKernel`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: u64,
    grid: u32,
    grid_y: u32,
    grid_z: u32,
    threads: u32,
    threads_y: u32,
    threads_z: u32,
    shared: u32,
    stream: u64,
    parameters: *const *const c_void,
    extra: *const *const c_void,
) -> u32 {
    call("cuLaunchKernel", Kind::Takes, |books| {
        let grid = [grid, grid_y, grid_z];
        let block = [threads, threads_y, threads_z];
        // SAFETY: as the caller promises.
        unsafe {
            let given = (function, grid, block, shared, stream);
            launch(books, "cuLaunchKernel", given, parameters, extra)
        }
    })
}

/// `CUlaunchConfig`.
#[repr(C)]
#[derive(Debug)]
pub struct LaunchConfig {
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    stream: u64,
    attributes: *const LaunchAttribute,
    count: u32,
}

/// `CUlaunchAttribute`.
#[repr(C)]
#[derive(Debug)]
pub struct LaunchAttribute {
    id: u32,
    pad: [u8; 4],
    value: [u64; 8],
}

/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`.
const OVERLAPPING: u32 = 6;

/// `cuLaunchKernelEx`, with the attribute that lets a launch begin before the one before it has ended: only for
/// kernels that wait themselves.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernelEx(
    config: *const LaunchConfig,
    function: u64,
    parameters: *const *const c_void,
    extra: *const *const c_void,
) -> u32 {
    call("cuLaunchKernelEx", Kind::Takes, |books| {
        // SAFETY: the caller's configuration, and as many attributes as it says.
        let (config, attributes) = unsafe {
            let config = &*config;
            (
                config,
                std::slice::from_raw_parts(config.attributes, config.count as usize),
            )
        };
        let is_known = |of: &LaunchAttribute| of.id == OVERLAPPING && of.value[0] as u32 == 1;
        if attributes.len() != 1 || !attributes.iter().all(is_known) {
            return Err(books.fault("cuLaunchKernelEx with other attributes".to_owned()));
        }
        let found = books.modules.functions.get(&function);
        let contents = found.and_then(|(module, _)| books.modules.contents.get(module));
        if contents.is_none_or(|contents| matches!(contents, Contents::Quantizing)) {
            return Err(books.fault("cuLaunchKernelEx of a kernel that does not wait".to_owned()));
        }
        // SAFETY: as the caller promises.
        unsafe {
            let given = (
                function,
                config.grid,
                config.block,
                config.shared,
                config.stream,
            );
            launch(books, "cuLaunchKernelEx", given, parameters, extra)
        }
    })
}

/// # Safety
/// As the driver's functions that launch.
unsafe fn launch(
    books: &mut Books,
    name: &str,
    (function, grid, block, shared, stream): (u64, [u32; 3], [u32; 3], u32, u64),
    parameters: *const *const c_void,
    extra: *const *const c_void,
) -> Result<(), u32> {
    let ([grid, grid_y, grid_z], [threads, threads_y, threads_z]) = (grid, block);
    let device = books.current(name)?;
    let found = books.modules.functions.get(&function).copied();
    let Some((module, kernel)) = found else {
        return Err(books.fault("a launch of what is not there".to_owned()));
    };
    if books.modules.loaded.get(&module) != Some(&device) {
        return Err(books.fault(format!("{kernel} launched under another context")));
    }
    let asked = books.modules.shared.get(&function).copied();
    if shared > asked.unwrap_or(UNASKED_SHARED) {
        return Err(books.fault(format!(
            "{kernel} launched with {shared} bytes not asked for"
        )));
    }
    if (grid_y, grid_z, threads_y, threads_z) != (1, 1, 1, 1) || !extra.is_null() {
        return Err(books.fault(format!("{kernel} launched in more than one dimension")));
    }
    // SAFETY: the caller's pointers to as many parameters as the kernel has.
    let parameters = unsafe { Parameters::new(parameters) };
    let shape = Shape {
        grid,
        threads,
        shared_bytes: shared,
    };
    let passed = match arguments(kernel, shape, parameters) {
        Ok(passed) => passed,
        Err(problem) => return Err(books.fault(format!("{kernel}: {problem}"))),
    };
    for (address, len) in passed.iter().filter_map(|argument| argument.memory()) {
        books.find_on(kernel, device, address, len)?;
    }
    books.launches.push(kernel);
    let work = Work::Launch {
        module,
        kernel,
        shape,
        passed,
    };
    books.give(name, device, stream, work)
}

/// `cuMemsetD8Async`.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8Async(at: u64, value: u8, len: usize, stream: u64) -> u32 {
    call("cuMemsetD8Async", Kind::Takes, |books: &mut Books| {
        let device = books.current("cuMemsetD8Async")?;
        books.find_on("cuMemsetD8Async", device, at, len)?;
        books.give(
            "cuMemsetD8Async",
            device,
            stream,
            Work::Set { at, value, len },
        )
    })
}

/// `cuMemsetD32Async`.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD32Async(at: u64, value: u32, count: usize, stream: u64) -> u32 {
    call("cuMemsetD32Async", Kind::Takes, |books: &mut Books| {
        let device = books.current("cuMemsetD32Async")?;
        if !at.is_multiple_of(4) {
            return Err(books.fault(format!("cuMemsetD32Async at {at:#x}")));
        }
        books.find_on("cuMemsetD32Async", device, at, 4 * count)?;
        let work = Work::Fill { at, value, count };
        books.give("cuMemsetD32Async", device, stream, work)
    })
}

/// `cuMemcpyDtoDAsync_v2`.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, len: usize, stream: u64) -> u32 {
    call("cuMemcpyDtoDAsync", Kind::Takes, |books: &mut Books| {
        let device = books.current("cuMemcpyDtoDAsync")?;
        for at in [to, from] {
            books.find_on("cuMemcpyDtoDAsync", device, at, len)?;
        }
        let work = Work::Move { to, from, len };
        books.give("cuMemcpyDtoDAsync", device, stream, work)
    })
}
