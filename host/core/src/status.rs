//! The few classes into which every error falls: the command's exit statuses, and what the C
//! interface returns. Each error says beside its definition which it is.

/// What kind of outcome it is. As a number it is the command's exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Status {
    /// It was done.
    Done = 0,
    /// Something that none of the others says, also a fault of ours.
    Other = 1,
    /// The call is wrong: an argument, a setting, a name.
    Usage = 2,
    /// The checkpoint is invalid or unreadable.
    Checkpoint = 3,
    /// The model does not fit on the devices, or the policy refuses it.
    DoesNotFit = 4,
    /// The policy or the driver itself failed: a trap, a limit, a bad plan.
    Policy = 5,
    /// A device failed or has less memory than it said, or this machine cannot run a policy.
    Device = 6,
    /// It was asked to stop.
    Interrupted = 130,
}
