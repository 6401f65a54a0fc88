//! Who this user is, and who may do something with a file: the system's functions for that.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::windows::ffi::OsStrExt;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::path::Path;
use std::ptr::null_mut;

use windows_sys::Win32::Foundation::{INVALID_HANDLE_VALUE, LocalFree};
use windows_sys::Win32::Security::Authorization::{
    ConvertSecurityDescriptorToStringSecurityDescriptorW, ConvertSidToStringSidW,
    ConvertStringSecurityDescriptorToSecurityDescriptorW, GetSecurityInfo, SDDL_REVISION_1,
    SE_FILE_OBJECT,
};
use windows_sys::Win32::Security::{
    DACL_SECURITY_INFORMATION, GetTokenInformation, OWNER_SECURITY_INFORMATION,
    PSECURITY_DESCRIPTOR, SECURITY_ATTRIBUTES, TOKEN_QUERY, TOKEN_USER, TokenUser,
};
use windows_sys::Win32::Storage::FileSystem::{
    CREATE_NEW, CreateDirectoryW, CreateFileW, FILE_ATTRIBUTE_NORMAL, FILE_GENERIC_WRITE,
    FILE_SHARE_DELETE, FILE_SHARE_READ,
};
use windows_sys::Win32::System::Threading::{GetCurrentProcess, OpenProcessToken};
use windows_sys::core::BOOL;

/// What is asked for.
const WANTED: u32 = OWNER_SECURITY_INFORMATION | DACL_SECURITY_INFORMATION;

/// Memory that the system has allocated, freed when dropped; null where it has not.
struct Allocated<T>(*mut T);

impl<T> Drop for Allocated<T> {
    fn drop(&mut self) {
        // SAFETY: null, or allocated by a function that has this one free it, and nobody else does.
        unsafe { LocalFree(self.0.cast()) };
    }
}

fn done(answer: BOOL) -> io::Result<()> {
    match answer {
        0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Returns a text of the system's.
///
/// # Safety
/// It points to characters that end in a zero.
unsafe fn text(characters: *const u16) -> String {
    let mut length = 0;
    // SAFETY: there is a zero behind whatever is none.
    while unsafe { *characters.add(length) } != 0 {
        length += 1;
    }
    // SAFETY: so many were just read.
    let characters = unsafe { std::slice::from_raw_parts(characters, length) };
    String::from_utf16_lossy(characters)
}

fn wide(text: impl Iterator<Item = u16>) -> Vec<u16> {
    text.chain([0]).collect()
}

/// A description of who may do what.
struct Descriptor(Allocated<core::ffi::c_void>);

impl Descriptor {
    fn parse(sddl: &str) -> io::Result<Descriptor> {
        let sddl = wide(sddl.encode_utf16());
        let mut descriptor: PSECURITY_DESCRIPTOR = null_mut();
        // SAFETY: the text ends in a zero, and `descriptor` outlives the call, which allocates.
        let answer = unsafe {
            ConvertStringSecurityDescriptorToSecurityDescriptorW(
                sddl.as_ptr(),
                SDDL_REVISION_1,
                &raw mut descriptor,
                null_mut(),
            )
        };
        let descriptor = Descriptor(Allocated(descriptor));
        done(answer).map(|()| descriptor)
    }

    /// Returns it as a text, in which accounts have their short names.
    fn sddl(&self) -> io::Result<String> {
        let mut sddl = Allocated(null_mut());
        // SAFETY: the descriptor is whole, and `sddl` outlives the call, which allocates.
        done(unsafe {
            ConvertSecurityDescriptorToStringSecurityDescriptorW(
                self.0.0,
                SDDL_REVISION_1,
                WANTED,
                &raw mut sddl.0,
                null_mut(),
            )
        })?;
        // SAFETY: it ends in a zero.
        Ok(unsafe { text(sddl.0) })
    }
}

/// Returns the user that this process runs as, as [`of_file`] names accounts.
pub(super) fn user() -> io::Result<String> {
    let mut token = null_mut();
    // SAFETY: `token` outlives the call; a process's handle for itself needs no closing.
    done(unsafe { OpenProcessToken(GetCurrentProcess(), TOKEN_QUERY, &raw mut token) })?;
    // SAFETY: opened just now, and nobody else's.
    let token = unsafe { OwnedHandle::from_raw_handle(token) };
    // The longest account takes 68 bytes, behind a pointer to it.
    let mut buffer = [0u64; 32];
    let (room, mut length) = (size_of_val(&buffer) as u32, 0);
    // SAFETY: the buffer has as many bytes as is said, aligned for what is written there.
    done(unsafe {
        GetTokenInformation(
            token.as_raw_handle(),
            TokenUser,
            buffer.as_mut_ptr().cast(),
            room,
            &raw mut length,
        )
    })?;
    let mut name = Allocated(null_mut());
    // SAFETY: the buffer begins with this structure, whose pointer leads into it; the call allocates.
    done(unsafe {
        let user = &*buffer.as_ptr().cast::<TOKEN_USER>();
        ConvertSidToStringSidW(user.User.Sid, &raw mut name.0)
    })?;
    // SAFETY: it ends in a zero.
    let name = unsafe { text(name.0) };
    // Some have a short name in descriptions, and only there.
    let sddl = Descriptor::parse(&format!("O:{name}D:P"))?.sddl()?;
    let name = sddl
        .strip_prefix("O:")
        .and_then(|rest| rest.split_once("D:"));
    name.map(|(name, _)| name.to_owned())
        .ok_or_else(|| io::Error::other("the system does not name this user"))
}

/// Returns the owner of an open file or directory, and who may do what with it.
pub(super) fn of_file(file: &File) -> io::Result<String> {
    let mut descriptor: PSECURITY_DESCRIPTOR = null_mut();
    // SAFETY: the handle is open as long as the file is borrowed, and `descriptor` outlives the call,
    // which allocates; the other places may be null.
    let error = unsafe {
        GetSecurityInfo(
            file.as_raw_handle(),
            SE_FILE_OBJECT,
            WANTED,
            null_mut(),
            null_mut(),
            null_mut(),
            null_mut(),
            &raw mut descriptor,
        )
    };
    let descriptor = Descriptor(Allocated(descriptor));
    match error {
        0 => descriptor.sddl(),
        error => Err(io::Error::from_raw_os_error(error as i32)),
    }
}

/// A description as functions take it that make something.
struct Attributes {
    attributes: SECURITY_ATTRIBUTES,
    _descriptor: Descriptor,
}

impl Attributes {
    fn parse(sddl: &str) -> io::Result<Attributes> {
        let descriptor = Descriptor::parse(sddl)?;
        let attributes = SECURITY_ATTRIBUTES {
            nLength: size_of::<SECURITY_ATTRIBUTES>() as u32,
            lpSecurityDescriptor: descriptor.0.0,
            bInheritHandle: 0,
        };
        Ok(Attributes {
            attributes,
            _descriptor: descriptor,
        })
    }
}

/// Makes a directory with which only these may do something, from the beginning on.
pub(super) fn make_directory(path: &Path, sddl: &str) -> io::Result<()> {
    let attributes = Attributes::parse(sddl)?;
    let path = wide(path.as_os_str().encode_wide());
    // SAFETY: the path ends in a zero, and the attributes and what they point to outlive the call.
    done(unsafe { CreateDirectoryW(path.as_ptr(), &raw const attributes.attributes) })
}

/// Makes a file in the same way, and opens it to be written.
pub(super) fn make_file(path: &Path, sddl: &str) -> io::Result<File> {
    let attributes = Attributes::parse(sddl)?;
    let path = wide(path.as_os_str().encode_wide());
    // SAFETY: as above.
    let handle = unsafe {
        CreateFileW(
            path.as_ptr(),
            FILE_GENERIC_WRITE,
            FILE_SHARE_READ | FILE_SHARE_DELETE,
            &raw const attributes.attributes,
            CREATE_NEW,
            FILE_ATTRIBUTE_NORMAL,
            null_mut(),
        )
    };
    match handle {
        INVALID_HANDLE_VALUE => Err(io::Error::last_os_error()),
        // SAFETY: opened just now, and nobody else's.
        handle => Ok(unsafe { File::from_raw_handle(handle) }),
    }
}
