//! The driver's library, looked for where a driver's installer puts it.

use libloading::Library;

/// Returns the library, which stays open; `None` where there is none.
#[cfg(not(windows))]
pub(super) fn library() -> Option<&'static Library> {
    use cudarc::driver::sys;

    // SAFETY: opens and closes the library by its well-known name, and runs what it runs when it is opened.
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    // SAFETY: as above; it can be opened.
    Some(unsafe { sys::culib() })
}

/// Returns the library, which stays open; `None` where there is none. In the system's directory only:
/// Windows would look in this process's working directory too, where anybody may have put one, and
/// cudarc for many names.
#[cfg(windows)]
pub(super) fn library() -> Option<&'static Library> {
    use std::sync::OnceLock;

    use libloading::os::windows::{LOAD_LIBRARY_SEARCH_SYSTEM32, Library as Opened};

    static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    let open = || {
        // SAFETY: runs what the library runs when it is opened; only who administers the machine can put
        // one there.
        let opened = unsafe { Opened::load_with_flags("nvcuda.dll", LOAD_LIBRARY_SEARCH_SYSTEM32) };
        opened.ok().map(Library::from)
    };
    LIBRARY.get_or_init(open).as_ref()
}
