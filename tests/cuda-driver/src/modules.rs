//! Modules and their functions, and launches of these.

use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, c_char, c_void};

use tightfit_kernels::cuda::{KERNELS, PTX};

use crate::books::{Books, Kind, UNSUPPORTED_PTX_VERSION, call};
use crate::kernels::{Parameters, arguments};
use crate::streams::Work;

/// What has been loaded.
#[derive(Debug, Default)]
pub(crate) struct Modules {
    /// The device of each, by handle.
    pub(crate) loaded: HashMap<u64, usize>,
    /// Those whose data is still on its way to the device, by handle.
    arriving: HashSet<u64>,
    /// Module and kernel, by handle.
    functions: HashMap<u64, (u64, &'static str)>,
}

/// `cuModuleLoadData`. There is one module that it can compile: ours.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(out: *mut u64, image: *const c_void) -> u32 {
    call("cuModuleLoadData", Kind::Takes, |books| {
        let device = books.current("cuModuleLoadData")?;
        // SAFETY: PTX is passed as text that ends in a zero.
        let image = unsafe { CStr::from_ptr(image.cast::<c_char>()) };
        if image.to_bytes() != PTX.as_bytes() {
            return Err(books.fault("cuModuleLoadData of other than our PTX".to_owned()));
        }
        if books.setup.refuses_modules {
            return Err(UNSUPPORTED_PTX_VERSION);
        }
        let handle = books.handle();
        books.modules.loaded.insert(handle, device);
        books.modules.arriving.insert(handle);
        // SAFETY: the caller's pointer to the result.
        unsafe { out.write(handle) };
        Ok(())
    })
}

impl Modules {
    /// Notes that whatever was on its way to a device is there.
    pub(crate) fn have_arrived(&mut self, device: usize) {
        let loaded = &self.loaded;
        self.arriving
            .retain(|module| loaded.get(module) != Some(&device));
    }
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
        books.modules.arriving.remove(&module);
        let functions = &mut books.modules.functions;
        functions.retain(|_, (of, _)| *of != module);
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
        let kernel = KERNELS
            .iter()
            .find(|kernel| kernel.as_bytes() == name.to_bytes());
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
        let device = books.current("cuLaunchKernel")?;
        let found = books.modules.functions.get(&function).copied();
        let Some((module, kernel)) = found else {
            return Err(books.fault("cuLaunchKernel of what is not there".to_owned()));
        };
        if books.modules.loaded.get(&module) != Some(&device) {
            return Err(books.fault(format!("{kernel} launched under another context")));
        }
        if books.modules.arriving.contains(&module) {
            books.fault(format!("{kernel} launched before its module has arrived"));
        }
        if (grid_y, grid_z, threads_y, threads_z, shared) != (1, 1, 1, 1, 0) || !extra.is_null() {
            return Err(books.fault(format!("{kernel} launched in more than one dimension")));
        }
        // SAFETY: the caller's pointers to as many parameters as the kernel has.
        let parameters = unsafe { Parameters::new(parameters) };
        let passed = match arguments(kernel, (grid, threads), parameters) {
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
            shape: (grid, threads),
            passed,
        };
        books.give("cuLaunchKernel", device, stream, work)
    })
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
