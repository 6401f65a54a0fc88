//! Where C's pointers become Rust's values and back, and where errors and panics stop.
//!
//! All that the rest of this crate does with a caller's pointer goes through these functions.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tightfit::status::Status;

use crate::TightfitStatus;

/// A failure on its way to the caller.
#[derive(Debug)]
pub(crate) struct Error {
    status: Status,
    message: String,
}

impl Error {
    /// One of a class of the library's.
    pub(crate) fn new(status: Status, message: impl Display) -> Error {
        Error {
            status,
            message: message.to_string(),
        }
    }

    /// A call that is wrong.
    pub(crate) fn usage(message: impl Display) -> Error {
        Error::new(Status::Usage, message)
    }
}

/// Any error of the library's that has a class.
impl<E: Display> From<E> for Error
where
    Status: for<'a> From<&'a E>,
{
    fn from(error: E) -> Error {
        Error::new(Status::from(&error), &error)
    }
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// The message of this thread's last failure, empty before the first.
pub(crate) fn last_error() -> *const c_char {
    LAST_ERROR.with(|last| last.borrow().as_ptr())
}

/// Runs the body of a function: an error is kept for [`last_error`], a panic is an error.
pub(crate) fn call(body: impl FnOnce() -> Result<(), Error>) -> TightfitStatus {
    // What a body changes before it could panic are values of its own.
    let error = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return TightfitStatus::Done,
        Ok(Err(error)) => error,
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().copied();
            let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
            let text = text.unwrap_or("no message");
            Error::new(Status::Other, format_args!("internal error: {text}"))
        }
    };
    LAST_ERROR.with(|last| *last.borrow_mut() = c_string(&error.message));
    error.status.into()
}

/// A text as C has it.
pub(crate) fn c_string(text: &str) -> CString {
    // Only a path or a policy's message can have a zero byte.
    CString::new(text.replace('\0', "\u{fffd}")).unwrap_or_default()
}

/// A text that must be there.
///
/// # Safety
/// `text` is NULL or ends with a zero byte, and nobody writes to it during `'a`.
pub(crate) unsafe fn text<'a>(text: *const c_char, what: &str) -> Result<&'a str, Error> {
    if text.is_null() {
        return Err(Error::usage(format_args!("{what} is NULL")));
    }
    // SAFETY: not NULL, and ends with a zero byte as the caller promises.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str()
        .map_err(|error| Error::usage(format_args!("{what} is not UTF-8: {error}")))
}

/// What a pointer points to, which must be there.
///
/// # Safety
/// `pointer` is NULL or points to a `T` that lives and is not written to during `'a`.
pub(crate) unsafe fn object<'a, T>(pointer: *const T, what: &str) -> Result<&'a T, Error> {
    // SAFETY: NULL or valid for `'a`, as the caller promises.
    unsafe { pointer.as_ref() }.ok_or_else(|| Error::usage(format_args!("{what} is NULL")))
}

/// An array, which may be NULL when it is empty.
///
/// # Safety
/// `pointer` is NULL or points to `count` values that are not written to during `'a`.
pub(crate) unsafe fn array<'a, T>(
    pointer: *const T,
    count: usize,
    what: &str,
) -> Result<&'a [T], Error> {
    check_array::<T>(pointer, count, what)?;
    if count == 0 {
        return Ok(&[]);
    }
    // SAFETY: not NULL, aligned, of a possible length, and valid as the caller promises.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

/// An array of plain numbers to be written, which may be NULL when it is empty.
///
/// # Safety
/// `pointer` is NULL or points to `count` values that nobody else uses during `'a`.
pub(crate) unsafe fn array_mut<'a, T: Copy + Default>(
    pointer: *mut T,
    count: usize,
    what: &str,
) -> Result<&'a mut [T], Error> {
    check_array::<T>(pointer, count, what)?;
    if count == 0 {
        return Ok(&mut []);
    }
    for index in 0..count {
        // The caller's memory may never have been written.
        // SAFETY: inside the array that the caller promises.
        unsafe { pointer.add(index).write(T::default()) };
    }
    // SAFETY: not NULL, aligned, of a possible length, initialized, and ours as the caller promises.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer, count) })
}

fn check_array<T>(pointer: *const T, count: usize, what: &str) -> Result<(), Error> {
    if count == 0 {
        return Ok(());
    }
    if pointer.is_null() {
        return Err(Error::usage(format_args!(
            "{what} is NULL but has {count} elements"
        )));
    }
    if !pointer.is_aligned() {
        return Err(Error::usage(format_args!("{what} is not aligned")));
    }
    if count > isize::MAX as usize / size_of::<T>().max(1) {
        return Err(Error::usage(format_args!(
            "{what} cannot have {count} elements"
        )));
    }
    Ok(())
}

/// Gives the caller a new object.
///
/// # Safety
/// `out` is NULL or can be written.
pub(crate) unsafe fn give<T>(
    out: *mut *mut T,
    what: &str,
    make: impl FnOnce() -> Result<T, Error>,
) -> Result<(), Error> {
    // SAFETY: as the caller promises.
    unsafe { give_pointer(out, what, || Ok(Box::into_raw(Box::new(make()?)))) }
}

/// Gives the caller what a pointer leads to, which becomes its own.
///
/// # Safety
/// `out` is NULL or can be written.
pub(crate) unsafe fn give_pointer<T>(
    out: *mut *mut T,
    what: &str,
    make: impl FnOnce() -> Result<*mut T, Error>,
) -> Result<(), Error> {
    if out.is_null() {
        return Err(Error::usage(format_args!("{what} is NULL")));
    }
    // Also when this fails the caller has something to close.
    // SAFETY: not NULL, so it can be written, as the caller promises.
    unsafe { out.write(std::ptr::null_mut()) };
    let object = make()?;
    // SAFETY: as above.
    unsafe { out.write(object) };
    Ok(())
}

/// Takes an object back from the caller, whose pointer becomes NULL, and drops it.
///
/// # Safety
/// `object` is NULL, or points to NULL or to what [`give`] gave and nobody else uses.
pub(crate) unsafe fn take<T>(object: *mut *mut T) {
    // SAFETY: as the caller promises.
    let given = unsafe { take_value(object) };
    // A panic must not reach the caller, who can do nothing about one here.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(given)));
}

/// Takes an object back from the caller, whose pointer becomes NULL.
///
/// # Safety
/// As [`take`].
pub(crate) unsafe fn take_value<T>(object: *mut *mut T) -> Option<Box<T>> {
    if object.is_null() {
        return None;
    }
    // SAFETY: not NULL, so it can be read and written, as the caller promises.
    let given = unsafe { object.replace(std::ptr::null_mut()) };
    if given.is_null() {
        return None;
    }
    // SAFETY: made by `give`, and not taken before because the pointer is NULL from then on.
    Some(unsafe { Box::from_raw(given) })
}

/// A structure that begins with its size, so that it can grow.
///
/// # Safety
/// It is `repr(C)`, its first field is a `usize`, and all its bytes may be zero.
pub(crate) unsafe trait Growing {
    /// Bytes of its first published form.
    const FIRST: usize;
}

/// Checks the size at the start of a caller's structure.
///
/// # Safety
/// `pointer` is NULL or points to a `usize`.
unsafe fn caller_size<T: Growing>(pointer: *const T, what: &str) -> Result<usize, Error> {
    if pointer.is_null() {
        return Err(Error::usage(format_args!("{what} is NULL")));
    }
    if !pointer.is_aligned() {
        return Err(Error::usage(format_args!("{what} is not aligned")));
    }
    // SAFETY: not NULL and aligned, so its first field can be read, as the caller promises.
    let size = unsafe { pointer.cast::<usize>().read() };
    // More than any version will have: this was never set.
    if !(T::FIRST..=4096).contains(&size) {
        return Err(Error::usage(format_args!(
            "{what}->struct_size is {size}: it must be the size of the structure"
        )));
    }
    Ok(size)
}

/// Reads a caller's structure; what an older caller does not have is zero.
///
/// # Safety
/// `pointer` is NULL or points to a structure of as many bytes as its first field says.
pub(crate) unsafe fn read_sized<T: Growing>(pointer: *const T, what: &str) -> Result<T, Error> {
    // SAFETY: as the caller promises.
    let size = unsafe { caller_size(pointer, what) }?;
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: no more than either structure has, and every byte of `value` is set and may be zero.
    unsafe {
        std::ptr::copy_nonoverlapping(
            pointer.cast::<u8>(),
            value.as_mut_ptr().cast::<u8>(),
            size.min(size_of::<T>()),
        );
        Ok(value.assume_init())
    }
}

/// Fills a caller's structure as far as it reaches; what it has beyond ours becomes zero.
///
/// # Safety
/// `pointer` is NULL or points to a structure of as many bytes as its first field says.
pub(crate) unsafe fn write_sized<T: Growing>(
    pointer: *mut T,
    what: &str,
    make: impl FnOnce(usize) -> Result<T, Error>,
) -> Result<(), Error> {
    // SAFETY: as the caller promises.
    let size = unsafe { caller_size(pointer, what) }?;
    let value = make(size)?;
    // SAFETY: no more than either structure has.
    unsafe {
        pointer.cast::<u8>().write_bytes(0, size);
        std::ptr::copy_nonoverlapping(
            (&raw const value).cast::<u8>(),
            pointer.cast::<u8>(),
            size.min(size_of::<T>()),
        );
    }
    Ok(())
}
