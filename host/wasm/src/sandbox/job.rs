//! Limits on another process, which ends when this one does, on Windows.
#![allow(unsafe_code)]

use std::io;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::process::Child;
use std::ptr::null;

use windows_sys::Win32::System::JobObjects::{
    AssignProcessToJobObject, CreateJobObjectW, JOB_OBJECT_LIMIT_ACTIVE_PROCESS,
    JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE, JOB_OBJECT_LIMIT_PROCESS_MEMORY,
    JOB_OBJECT_LIMIT_PROCESS_TIME, JOBOBJECT_EXTENDED_LIMIT_INFORMATION,
    JobObjectExtendedLimitInformation, SetInformationJobObject,
};

/// A process with limits. It is ended when this is dropped, or this process ends in whatever way.
#[derive(Debug)]
pub(super) struct Job(#[expect(dead_code, reason = "it is held")] OwnedHandle);

impl Job {
    /// Limits a process to so many bytes that are its own, so many seconds of processor time, and itself.
    pub(super) fn of(child: &Child, memory: u64, seconds: u64) -> io::Result<Job> {
        // SAFETY: neither attributes nor a name are needed.
        let job = unsafe { CreateJobObjectW(null(), null()) };
        if job.is_null() {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: made just now, and nobody else's.
        let job = unsafe { OwnedHandle::from_raw_handle(job) };
        let mut limits = JOBOBJECT_EXTENDED_LIMIT_INFORMATION::default();
        limits.BasicLimitInformation.LimitFlags = JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
            | JOB_OBJECT_LIMIT_PROCESS_MEMORY
            | JOB_OBJECT_LIMIT_PROCESS_TIME
            | JOB_OBJECT_LIMIT_ACTIVE_PROCESS;
        limits.BasicLimitInformation.ActiveProcessLimit = 1;
        // In units of 100 ns.
        let time = seconds.saturating_mul(10_000_000);
        limits.BasicLimitInformation.PerProcessUserTimeLimit =
            i64::try_from(time).unwrap_or(i64::MAX);
        limits.ProcessMemoryLimit = usize::try_from(memory).unwrap_or(usize::MAX);
        // SAFETY: the structure is the one for this class, and outlives the call.
        let limited = unsafe {
            SetInformationJobObject(
                job.as_raw_handle(),
                JobObjectExtendedLimitInformation,
                (&raw const limits).cast(),
                size_of_val(&limits) as u32,
            )
        };
        if limited == 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: both handles are open.
        let assigned =
            unsafe { AssignProcessToJobObject(job.as_raw_handle(), child.as_raw_handle()) };
        match assigned {
            0 => Err(io::Error::last_os_error()),
            _ => Ok(Job(job)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn what_waits_for_input_for_ever_ends_with_its_job() {
        let mut command = Command::new("cmd");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // Not closed by waiting.
        let input = child.stdin.take();
        let job = Job::of(&child, 1 << 30, 60).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        assert!(
            child.try_wait().unwrap().is_none(),
            "it has ended by itself"
        );
        drop(job);
        let started = Instant::now();
        child.wait().unwrap();
        assert!(started.elapsed() < Duration::from_secs(30));
        drop(input);
    }
}
