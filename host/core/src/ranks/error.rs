//! Why ranks do not go on together.

use std::fmt;

use super::Digest;
use crate::status::Status;

/// What one rank tells the others when it cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Its class.
    pub status: Status,
    /// The sentence for people.
    pub sentence: String,
}

impl Failure {
    /// Returns a failure of which the class and the sentence are known.
    pub fn new(status: Status, sentence: &dyn fmt::Display) -> Failure {
        Failure {
            status,
            sentence: sentence.to_string(),
        }
    }
}

/// Why ranks do not go on together. It is the same sentence on all of them, where it can be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RankError {
    /// Rank 0 cannot listen.
    #[error(
        "rank 0 cannot listen at {address}: {reason}; another address may be free (--rendezvous)"
    )]
    CannotListen {
        /// Where.
        address: String,
        /// What the system says.
        reason: String,
    },
    /// Nobody answered as rank 0.
    #[error(
        "rank 0 was not found at {address} within {seconds} s (--rendezvous-timeout): {reason}"
    )]
    Unreachable {
        /// Where.
        address: String,
        /// How long it was tried.
        seconds: u64,
        /// What came of the last try.
        reason: String,
    },
    /// Some ranks did not come.
    #[error(
        "{} not come to {address} within {seconds} s (--rendezvous-timeout){}",
        Have(ranks),
        TurnedAway(*turned_away)
    )]
    Absent {
        /// Those that did not.
        ranks: Vec<u32>,
        /// Where.
        address: String,
        /// How long they were waited for.
        seconds: u64,
        /// Connections that were none of theirs.
        turned_away: u64,
    },
    /// Rank 0 is of another world.
    #[error("rank 0 at {address} does not let rank {rank} in: {reason}")]
    NotLetIn {
        /// Where.
        address: String,
        /// Who was not let in.
        rank: u32,
        /// Why.
        reason: &'static str,
    },
    /// A rank's process has ended, or its machine cannot be reached any more.
    #[error("rank {rank} has ended before its share was loaded")]
    Lost {
        /// Which.
        rank: u32,
    },
    /// A rank says nothing.
    #[error("rank {rank} has not answered within {seconds} s (--rendezvous-timeout)")]
    Late {
        /// Which.
        rank: u32,
        /// How long it was waited for.
        seconds: u64,
    },
    /// A rank cannot go on.
    #[error("rank {rank}: {}", failure.sentence)]
    Failed {
        /// Which; of several the first.
        rank: u32,
        /// Why.
        failure: Failure,
    },
    /// No rank can go on, and all for the same reason.
    #[error("{}", failure.sentence)]
    AllFailed {
        /// Why.
        failure: Failure,
    },
    /// A rank sees other files.
    #[error(
        "rank {rank} sees other files than rank 0: tensors, their places or the lengths of files differ \
         (digests {other} and {first}); compare the checkpoints on both, and --revision and --dequantize"
    )]
    OtherFiles {
        /// Which.
        rank: u32,
        /// The beginning of rank 0's digest of the files.
        first: String,
        /// That of the other rank's.
        other: String,
    },
    /// A rank counts with other devices.
    #[error(
        "rank {rank} counts with other devices than rank 0 (digests {other} and {first}): give all ranks the \
         same --device"
    )]
    OtherDevices {
        /// Which.
        rank: u32,
        /// The beginning of rank 0's digest of the devices.
        first: String,
        /// That of the other rank's.
        other: String,
    },
    /// A rank has another plan for the same files and devices.
    #[error(
        "rank {rank} has made another plan than rank 0 for the same files and devices (digests {other} and \
         {first}): compare policy and settings, and versions of tightfit"
    )]
    OtherPlan {
        /// Which.
        rank: u32,
        /// The beginning of rank 0's digest.
        first: String,
        /// That of the other rank's.
        other: String,
    },
    /// The plan is another than the one asked for.
    #[error(
        "the plan's digest is {have}, and {need} was asked for (--digest): the files, their lengths, the devices, what is free on them, the policy or the version of tightfit differ"
    )]
    NotTheDigest {
        /// The digest that was asked for.
        need: Digest,
        /// The plan's.
        have: Digest,
    },
    /// What came from a rank makes no sense.
    #[error("rank {rank} has sent what makes no sense: {reason}")]
    Nonsense {
        /// Which.
        rank: u32,
        /// What is wrong.
        reason: String,
    },
    /// The system has no more threads.
    #[error("cannot start a thread to listen to other ranks: {reason}")]
    NoThread {
        /// What the system says.
        reason: String,
    },
    /// It was asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl From<&RankError> for Status {
    fn from(error: &RankError) -> Status {
        match error {
            RankError::Failed { failure, .. } | RankError::AllFailed { failure } => failure.status,
            RankError::OtherFiles { .. } => Status::Checkpoint,
            RankError::NotLetIn { .. }
            | RankError::OtherDevices { .. }
            | RankError::OtherPlan { .. }
            | RankError::NotTheDigest { .. } => Status::Usage,
            RankError::CannotListen { .. }
            | RankError::Unreachable { .. }
            | RankError::Absent { .. }
            | RankError::Lost { .. }
            | RankError::Late { .. }
            | RankError::Nonsense { .. } => Status::Device,
            RankError::NoThread { .. } => Status::Other,
            RankError::Cancelled => Status::Interrupted,
        }
    }
}

/// Ranks as the subject of a sentence; of many the first.
struct Have<'a>(&'a [u32]);

impl fmt::Display for Have<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MOST: usize = 8;
        match self.0 {
            [rank] => write!(f, "rank {rank} has"),
            ranks => {
                f.write_str("ranks ")?;
                for (index, rank) in ranks.iter().take(MOST).enumerate() {
                    write!(f, "{}{rank}", if index == 0 { "" } else { ", " })?;
                }
                match ranks.len().checked_sub(MOST) {
                    None | Some(0) => f.write_str(" have"),
                    Some(more) => write!(f, " and {more} more have"),
                }
            }
        }
    }
}

struct TurnedAway(u64);

impl fmt::Display for TurnedAway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            1 => f.write_str("; 1 connection of somebody else was turned away"),
            many => write!(f, "; {many} connections of somebody else were turned away"),
        }
    }
}
