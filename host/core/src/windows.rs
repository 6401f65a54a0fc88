//! What Windows tells of an open file and of memory, and the standard library does not pass on.
//!
//! There are no directory handles that files are opened from there. So a file is opened by its path, and
//! then asked which one it has become.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::windows::ffi::OsStringExt;
use std::os::windows::io::AsRawHandle;
use std::path::PathBuf;

use std::ptr::{null, null_mut};

use windows_sys::Win32::Storage::FileSystem::{
    BY_HANDLE_FILE_INFORMATION, GetFileInformationByHandle, GetFinalPathNameByHandleW,
    VOLUME_NAME_DOS,
};
use windows_sys::Win32::System::IO::DeviceIoControl;
use windows_sys::Win32::System::SystemInformation::{GlobalMemoryStatusEx, MEMORYSTATUSEX};

/// `FSCTL_SET_SPARSE`.
const SET_SPARSE: u32 = 0x9_00c4;

/// Most characters of a path, with its zero: the system has none that are longer.
const MOST_CHARACTERS: usize = 32_768;

/// Which file an open file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    /// The number of its volume, and its own there.
    pub(crate) number: (u64, u64),
    /// How many names it has.
    pub(crate) names: u32,
}

/// Returns the path that an open file or directory has now, without links: what
/// [`canonicalize`](std::fs::canonicalize) gives for a path.
pub(crate) fn path_of(file: &File) -> io::Result<PathBuf> {
    let mut path = vec![0u16; 512];
    loop {
        let room = u32::try_from(path.len()).unwrap_or(u32::MAX);
        // SAFETY: the handle is open as long as the file is borrowed, and `path` has room for as many
        // characters as is said.
        #[allow(unsafe_code)]
        let length = unsafe {
            GetFinalPathNameByHandleW(
                file.as_raw_handle(),
                path.as_mut_ptr(),
                room,
                VOLUME_NAME_DOS,
            )
        } as usize;
        match length {
            0 => return Err(io::Error::last_os_error()),
            _ if length < path.len() => {
                path.truncate(length);
                return Ok(OsString::from_wide(&path).into());
            }
            // It is what it needs, with the zero.
            _ if length <= MOST_CHARACTERS && path.len() < MOST_CHARACTERS => {
                path.resize(MOST_CHARACTERS, 0);
            }
            _ => return Err(io::ErrorKind::InvalidFilename.into()),
        }
    }
}

/// Returns which file it is.
pub(crate) fn identity_of(file: &File) -> io::Result<Identity> {
    let mut information = BY_HANDLE_FILE_INFORMATION::default();
    // SAFETY: the handle is open as long as the file is borrowed, and `information` outlives the call.
    #[allow(unsafe_code)]
    let answer = unsafe { GetFileInformationByHandle(file.as_raw_handle(), &raw mut information) };
    if answer == 0 {
        return Err(io::Error::last_os_error());
    }
    let number = u64::from(information.nFileIndexHigh) << 32 | u64::from(information.nFileIndexLow);
    Ok(Identity {
        number: (u64::from(information.dwVolumeSerialNumber), number),
        names: information.nNumberOfLinks,
    })
}

/// Has a file take room on the disk only for what is written to it, where the file system can.
pub(crate) fn make_sparse(file: &File) -> io::Result<()> {
    let mut answered = 0;
    // SAFETY: the handle is open as long as the file is borrowed; this call takes no bytes and gives none,
    // and `answered` outlives it.
    #[allow(unsafe_code)]
    let answer = unsafe {
        DeviceIoControl(
            file.as_raw_handle(),
            SET_SPARSE,
            null(),
            0,
            null_mut(),
            0,
            &raw mut answered,
            null_mut(),
        )
    };
    match answer {
        0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Returns the bytes of memory that this machine has, and those that are free and that the system would
/// still promise to this process.
pub(crate) fn memory() -> Option<(u64, u64)> {
    let mut status = MEMORYSTATUSEX {
        dwLength: size_of::<MEMORYSTATUSEX>() as u32,
        ..MEMORYSTATUSEX::default()
    };
    // SAFETY: the structure says how long it is, and outlives the call.
    #[allow(unsafe_code)]
    let answer = unsafe { GlobalMemoryStatusEx(&raw mut status) };
    let available = status.ullAvailPhys.min(status.ullAvailPageFile);
    (answer != 0).then_some((status.ullTotalPhys, available))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// `ERROR_MORE_DATA`.
    const MORE_DATA: i32 = 234;

    #[test]
    fn an_open_file_knows_its_path() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().canonicalize().unwrap();
        fs::create_dir(at.join("a")).unwrap();
        fs::write(at.join("a").join("b"), "").unwrap();
        let roundabout = directory.path().join("a").join("..").join("A").join("b");
        let file = File::open(roundabout).unwrap();
        assert_eq!(path_of(&file).unwrap(), at.join("a").join("b"));
    }

    #[test]
    fn a_long_path_is_told_in_whole() {
        let directory = tempfile::tempdir().unwrap();
        let mut at = directory.path().canonicalize().unwrap();
        for _ in 0..4 {
            at.push("n".repeat(200));
        }
        fs::create_dir_all(&at).unwrap();
        fs::write(at.join("a"), "").unwrap();
        let file = File::open(at.join("a")).unwrap();
        match path_of(&file) {
            // Wine 8 tells at most 260 characters.
            Err(error) if error.raw_os_error() == Some(MORE_DATA) => {
                eprintln!("not run: this is no Windows");
            }
            path => assert_eq!(path.unwrap(), at.join("a")),
        }
    }

    #[test]
    fn memory_is_what_a_machine_has() {
        let (total, available) = memory().unwrap();
        assert!(available > 1 << 20 && available <= total && total < 1 << 50);
    }

    #[test]
    fn a_sparse_file_may_be_longer_than_the_disk() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        let file = File::create(&path).unwrap();
        make_sparse(&file).unwrap();
        file.set_len(8 << 40).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 8 << 40);
    }

    #[test]
    fn two_names_are_one_file_and_two_files_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let identity = |name: &str| identity_of(&File::open(at(name)).unwrap()).unwrap();
        fs::write(at("a"), "").unwrap();
        fs::write(at("b"), "").unwrap();
        assert_eq!(identity("a").names, 1);
        assert_ne!(identity("a"), identity("b"));
        fs::hard_link(at("a"), at("c")).unwrap();
        assert_eq!(identity("a"), identity("c"));
        assert_eq!(identity("a").names, 2);
    }
}
