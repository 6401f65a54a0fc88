//! What ranks send each other. Whatever is read here may come from anybody: lengths are checked before
//! memory is taken, and nothing is believed that its reader does not check.

use std::io::{self, Read};

use serde::{Deserialize, Serialize};

use super::{Digest, Failure, PlanDigest};
use crate::device::{DeviceInfo, DeviceKind};
use crate::status::Status;
use crate::text::truncate;

/// The protocol and its version. What follows is fixed for it.
const MAGIC: [u8; 16] = *b"tightfit ranks 1";
/// Bytes of a version of this crate, the rest of which are zero.
const VERSION_BYTES: usize = 32;
/// Bytes of what a rank says first.
pub(super) const HELLO_BYTES: usize = MAGIC.len() + VERSION_BYTES + 8;
/// Bytes of what rank 0 answers.
pub(super) const ANSWER_BYTES: usize = MAGIC.len() + 4;
/// Most bytes of what one rank tells the others in one step.
pub(super) const MAX_PAYLOAD: usize = 64 << 10;
/// Most bytes of a sentence.
const MAX_SENTENCE: usize = 8 << 10;
/// Most devices of one rank.
pub const MAX_DEVICES: usize = 64;
/// Most bytes of a device's name.
const MAX_DEVICE_NAME: usize = 64;
/// The largest unit that reservations may be rounded up to.
const MAX_GRANULARITY: u64 = 1 << 30;

/// What a rank says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hello {
    version: [u8; VERSION_BYTES],
    pub(super) size: u32,
    pub(super) rank: u32,
}

impl Hello {
    pub(super) fn new(size: u32, rank: u32) -> Hello {
        let mut version = [0; VERSION_BYTES];
        let own = env!("CARGO_PKG_VERSION").as_bytes();
        let length = own.len().min(VERSION_BYTES);
        version[..length].copy_from_slice(&own[..length]);
        Hello {
            version,
            size,
            rank,
        }
    }

    pub(super) fn bytes(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        let (magic, rest) = bytes.split_at_mut(MAGIC.len());
        let (version, rest) = rest.split_at_mut(VERSION_BYTES);
        let (size, rank) = rest.split_at_mut(4);
        magic.copy_from_slice(&MAGIC);
        version.copy_from_slice(&self.version);
        size.copy_from_slice(&self.size.to_le_bytes());
        rank.copy_from_slice(&self.rank.to_le_bytes());
        bytes
    }

    /// Whether this may be the beginning of one: of another protocol's it is not waited for the end.
    pub(super) fn may_begin_with(said: &[u8]) -> bool {
        let length = said.len().min(MAGIC.len());
        said[..length] == MAGIC[..length]
    }

    /// Reads one; of another protocol it is none.
    pub(super) fn read(bytes: &[u8; HELLO_BYTES]) -> Option<Hello> {
        let (magic, rest) = bytes.split_first_chunk()?;
        let (version, rest) = rest.split_first_chunk()?;
        let (size, rest) = rest.split_first_chunk()?;
        let (rank, _) = rest.split_first_chunk()?;
        (*magic == MAGIC).then_some(Hello {
            version: *version,
            size: u32::from_le_bytes(*size),
            rank: u32::from_le_bytes(*rank),
        })
    }

    /// What rank 0 of a world of so many answers, where the place is not taken.
    pub(super) fn judge(&self, size: u32) -> Answer {
        if self.version != Hello::new(0, 0).version {
            Answer::OtherVersion
        } else if self.size != size {
            Answer::OtherWorld
        } else if self.rank == 0 || self.rank >= size {
            Answer::NoSuchRank
        } else {
            Answer::Welcome
        }
    }
}

/// What rank 0 answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Welcome,
    OtherVersion,
    OtherWorld,
    NoSuchRank,
    /// Another process has come as this rank, and is still there.
    Taken,
}

impl Answer {
    const ALL: [Answer; 5] = [
        Answer::Welcome,
        Answer::OtherVersion,
        Answer::OtherWorld,
        Answer::NoSuchRank,
        Answer::Taken,
    ];

    pub(super) fn bytes(self) -> [u8; ANSWER_BYTES] {
        let mut bytes = [0; ANSWER_BYTES];
        bytes[..MAGIC.len()].copy_from_slice(&MAGIC);
        bytes[MAGIC.len()] = self as u8;
        bytes
    }

    pub(super) fn read(bytes: &[u8; ANSWER_BYTES]) -> Option<Answer> {
        Answer::ALL
            .into_iter()
            .find(|answer| answer.bytes() == *bytes)
    }

    /// What is wrong, for the rank that was not let in.
    pub(super) fn reason(self) -> &'static str {
        match self {
            Answer::Welcome => "nothing is wrong",
            Answer::OtherVersion => "it runs another version of tightfit",
            Answer::OtherWorld => "it is of a world of another size (--world)",
            Answer::NoSuchRank => "it knows no such rank",
            Answer::Taken => "another process has come as this rank",
        }
    }
}

/// The steps that all ranks take together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Everyone tells of its devices.
    Devices,
    /// Everyone has made its plan.
    Plan,
    /// Everyone has its memory.
    Reserve,
    /// Everyone has loaded its share.
    Load,
}

impl Step {
    pub(super) const ALL: [Step; 4] = [Step::Devices, Step::Plan, Step::Reserve, Step::Load];

    pub(super) fn index(self) -> usize {
        self as usize
    }
}

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// What a rank tells in a step.
    Told,
    /// Why a rank cannot take a step: a [`Failure`].
    Failed,
    /// From rank 0: a rank's connection has ended.
    Lost,
    /// From rank 0: a rank says nothing.
    Late,
    /// From rank 0: all have come.
    Begin,
    /// From rank 0: some have not come. What was turned away, and the ranks.
    Absent,
}

impl Kind {
    const ALL: [Kind; 6] = [
        Kind::Told,
        Kind::Failed,
        Kind::Lost,
        Kind::Late,
        Kind::Begin,
        Kind::Absent,
    ];
}

/// A message. The rank is the one that it is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) kind: Kind,
    pub(super) step: Step,
    pub(super) rank: u32,
    pub(super) payload: Vec<u8>,
}

/// Kind, step, rank, length.
const HEADER_BYTES: usize = 10;

impl Message {
    /// One without anything beside its rank.
    pub(super) fn of(kind: Kind, rank: u32) -> Message {
        Message {
            kind,
            step: Step::Devices,
            rank,
            payload: Vec::new(),
        }
    }

    /// What a rank tells in a step, or why it cannot.
    pub(super) fn told(step: Step, rank: u32, told: &Result<Vec<u8>, Failure>) -> Message {
        let (kind, payload) = match told {
            Ok(told) => (Kind::Told, told.clone()),
            Err(failure) => (Kind::Failed, failure_bytes(failure)),
        };
        Message {
            kind,
            step,
            rank,
            payload,
        }
    }

    /// The same the other way round.
    pub(super) fn into_told(self) -> Result<Result<Vec<u8>, Failure>, &'static str> {
        match self.kind {
            Kind::Told => Ok(Ok(self.payload)),
            Kind::Failed => failure_of(&self.payload).map(Err),
            _ => Err("a message of another kind"),
        }
    }

    /// What is sent.
    pub(super) fn bytes(&self) -> Vec<u8> {
        debug_assert!(self.payload.len() <= MAX_PAYLOAD);
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.payload.len());
        bytes.extend([self.kind as u8, self.step as u8]);
        bytes.extend(self.rank.to_le_bytes());
        bytes.extend((self.payload.len() as u32).to_le_bytes());
        bytes.extend(&self.payload);
        bytes
    }

    /// Reads one. `InvalidData` is an error that makes no sense of what comes; nothing after it can be read.
    pub(super) fn read(from: &mut impl Read) -> io::Result<Message> {
        let nonsense = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        let mut header = [0; HEADER_BYTES];
        from.read_exact(&mut header)?;
        let [kind, step, r0, r1, r2, r3, l0, l1, l2, l3] = header;
        let kind = Kind::ALL.get(usize::from(kind)).copied();
        let step = Step::ALL.get(usize::from(step)).copied();
        let (Some(kind), Some(step)) = (kind, step) else {
            return Err(nonsense("a message of an unknown kind"));
        };
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if length > MAX_PAYLOAD {
            return Err(nonsense("a message that is too long"));
        }
        let mut payload = vec![0; length];
        from.read_exact(&mut payload)?;
        Ok(Message {
            kind,
            step,
            rank: u32::from_le_bytes([r0, r1, r2, r3]),
            payload,
        })
    }
}

const STATUSES: [Status; 8] = [
    Status::Done,
    Status::Other,
    Status::Usage,
    Status::Checkpoint,
    Status::DoesNotFit,
    Status::Policy,
    Status::Device,
    Status::Interrupted,
];

fn failure_bytes(failure: &Failure) -> Vec<u8> {
    let mut sentence = failure.sentence.clone();
    // With the mark of what was left out.
    truncate(&mut sentence, MAX_SENTENCE - '…'.len_utf8());
    [&[failure.status as u8], sentence.as_bytes()].concat()
}

fn failure_of(bytes: &[u8]) -> Result<Failure, &'static str> {
    let (&status, sentence) = bytes.split_first().ok_or("a failure without a class")?;
    // Nobody fails and is done.
    let known = STATUSES[1..].iter().find(|known| **known as u8 == status);
    let status = *known.ok_or("a failure of an unknown class")?;
    if sentence.len() > MAX_SENTENCE {
        return Err("a sentence that is too long");
    }
    let sentence = std::str::from_utf8(sentence).map_err(|_| "a sentence that is not UTF-8")?;
    Ok(Failure {
        status,
        sentence: sentence.to_owned(),
    })
}

/// A device as a rank tells of it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Told {
    name: String,
    kind: ToldKind,
    capacity: u64,
    available: u64,
    granularity: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ToldKind {
    Cuda,
    Sim,
    Cpu,
}

/// What a rank tells of its devices.
pub(super) fn devices_bytes(devices: &[DeviceInfo]) -> Result<Vec<u8>, String> {
    if devices.len() > MAX_DEVICES {
        return Err(format!(
            "a rank has at most {MAX_DEVICES} devices, not {}",
            devices.len()
        ));
    }
    let told: Vec<Told> = devices
        .iter()
        .map(|device| Told {
            name: device.name.clone(),
            kind: match device.kind {
                DeviceKind::Cuda => ToldKind::Cuda,
                DeviceKind::Sim => ToldKind::Sim,
                DeviceKind::Cpu => ToldKind::Cpu,
            },
            capacity: device.capacity,
            available: device.available,
            granularity: device.granularity,
        })
        .collect();
    let bytes = serde_json::to_vec(&told).map_err(|error| error.to_string())?;
    devices_of(&bytes).map(|_| bytes)
}

/// The devices that a rank has told of.
pub(super) fn devices_of(bytes: &[u8]) -> Result<Vec<DeviceInfo>, String> {
    if bytes.len() > MAX_PAYLOAD {
        return Err("devices that take too many bytes".to_owned());
    }
    let told: Vec<Told> = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if told.len() > MAX_DEVICES {
        return Err(format!("{} devices", told.len()));
    }
    told.into_iter().map(device_of).collect()
}

fn device_of(told: Told) -> Result<DeviceInfo, String> {
    let is_name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b':' | b'-' | b'_' | b'.');
    if told.name.is_empty() || told.name.len() > MAX_DEVICE_NAME || !told.name.bytes().all(is_name)
    {
        return Err("a device with an impossible name".to_owned());
    }
    if !(1..=MAX_GRANULARITY).contains(&told.granularity) {
        return Err(format!("a granularity of {} bytes", told.granularity));
    }
    if told.available > told.capacity {
        return Err("a device with more free than it has".to_owned());
    }
    Ok(DeviceInfo {
        name: told.name,
        kind: match told.kind {
            ToldKind::Cuda => DeviceKind::Cuda,
            ToldKind::Sim => DeviceKind::Sim,
            ToldKind::Cpu => DeviceKind::Cpu,
        },
        capacity: told.capacity,
        available: told.available,
        granularity: told.granularity,
    })
}

/// What a rank tells of its plan.
pub(super) fn digest_bytes(digest: &PlanDigest) -> Vec<u8> {
    let parts = [
        digest.whole,
        digest.checkpoint,
        digest.devices,
        digest.placements,
    ];
    parts.iter().flat_map(|part| *part.bytes()).collect()
}

/// The digest that a rank has told.
pub(super) fn digest_of(bytes: &[u8]) -> Result<PlanDigest, String> {
    let (parts, rest) = bytes.as_chunks::<32>();
    let ([whole, checkpoint, devices, placements], []) = (parts, rest) else {
        return Err(format!("a digest of {} bytes", bytes.len()));
    };
    Ok(PlanDigest {
        whole: Digest::from(*whole),
        checkpoint: Digest::from(*checkpoint),
        devices: Digest::from(*devices),
        placements: Digest::from(*placements),
    })
}

/// Who has not come, and how many others have.
pub(super) fn absent_bytes(turned_away: u64, ranks: &[u32]) -> Vec<u8> {
    let mut bytes = turned_away.to_le_bytes().to_vec();
    bytes.extend(ranks.iter().flat_map(|rank| rank.to_le_bytes()));
    bytes
}

/// The same from its bytes.
pub(super) fn absent_of(bytes: &[u8]) -> Option<(u64, Vec<u32>)> {
    let (turned_away, rest) = bytes.split_first_chunk()?;
    let (ranks, []) = rest.as_chunks() else {
        return None;
    };
    let ranks = ranks.iter().map(|rank| u32::from_le_bytes(*rank)).collect();
    Some((u64::from_le_bytes(*turned_away), ranks))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::device;

    fn digest(byte: u8) -> Digest {
        Digest::from([byte; 32])
    }

    #[test]
    fn what_is_sent_is_read() {
        let hello = Hello::new(4, 3);
        assert_eq!(Hello::read(&hello.bytes()), Some(hello));
        assert_eq!(hello.judge(4), Answer::Welcome);
        assert_eq!(hello.judge(5), Answer::OtherWorld);
        assert_eq!(Hello::new(4, 4).judge(4), Answer::NoSuchRank);
        assert_eq!(Hello::new(4, 0).judge(4), Answer::NoSuchRank);
        let mut other = hello;
        other.version[0] ^= 1;
        assert_eq!(other.judge(4), Answer::OtherVersion);
        let mut bytes = hello.bytes();
        assert!((0..=bytes.len()).all(|end| Hello::may_begin_with(&bytes[..end])));
        assert!(!Hello::may_begin_with(b"t "));
        bytes[15] = b'2';
        assert!(Hello::may_begin_with(&bytes[..15]) && !Hello::may_begin_with(&bytes));
        assert_eq!(Hello::read(&bytes), None);
        for answer in Answer::ALL {
            assert_eq!(Answer::read(&answer.bytes()), Some(answer));
        }
        let devices = [device("cuda:3", u64::MAX, 2 << 20), device("sim:0", 7, 1)];
        assert_eq!(
            devices_of(&devices_bytes(&devices).unwrap()).unwrap(),
            devices
        );
        let plan = PlanDigest {
            whole: digest(1),
            checkpoint: digest(2),
            devices: digest(3),
            placements: digest(4),
        };
        assert_eq!(digest_of(&digest_bytes(&plan)), Ok(plan));
        assert_eq!(absent_of(&absent_bytes(7, &[1, 3])), Some((7, vec![1, 3])));
    }

    #[test]
    fn a_failure_keeps_its_class_and_as_much_of_its_sentence_as_there_is_room_for() {
        for status in &STATUSES[1..] {
            let failure = Failure::new(*status, &"no");
            assert_eq!(failure_of(&failure_bytes(&failure)), Ok(failure));
        }
        let long = Failure::new(Status::Other, &"é\u{202e}".repeat(100_000));
        let bytes = failure_bytes(&long);
        assert!(bytes.len() <= MAX_PAYLOAD);
        let sentence = failure_of(&bytes).unwrap().sentence;
        assert!(sentence.len() > 1000 && sentence.starts_with("é"));
        for bad in [&[][..], &[0], &[7, b'x'], &[2, 0xff]] {
            assert!(failure_of(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn devices_that_cannot_be_are_refused() {
        let good = |name: &str| device(name, 10, 1);
        for bad in [
            DeviceInfo {
                available: 11,
                ..good("a")
            },
            DeviceInfo {
                granularity: 0,
                ..good("a")
            },
            DeviceInfo {
                granularity: u64::MAX,
                ..good("a")
            },
            good(""),
            good("a/b"),
            good("a\u{1b}[2J"),
            good(&"x".repeat(65)),
        ] {
            assert!(
                devices_bytes(std::slice::from_ref(&bad)).is_err(),
                "{bad:?}"
            );
        }
        assert!(devices_bytes(&vec![good("a"); MAX_DEVICES + 1]).is_err());
        for bad in [
            "",
            "{}",
            "[1]",
            "[{}]",
            "[[[[",
            r#"[{"name":"a","kind":"tpu"}]"#,
        ] {
            assert!(devices_of(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_length_is_checked_before_it_is_believed() {
        let mut bytes = Message::of(Kind::Told, 1).bytes();
        bytes[6..10].copy_from_slice(&u32::MAX.to_le_bytes());
        let error = Message::read(&mut &bytes[..]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    proptest! {
        #[test]
        fn any_message_is_read_as_it_was_sent(
            kind in prop::sample::select(&Kind::ALL[..]),
            step in prop::sample::select(&Step::ALL[..]),
            rank in any::<u32>(),
            payload in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let message = Message { kind, step, rank, payload };
            let bytes = message.bytes();
            prop_assert_eq!(Message::read(&mut &bytes[..]).unwrap(), message);
            // Cut short it is none.
            for end in 0..bytes.len() {
                prop_assert!(Message::read(&mut &bytes[..end]).is_err());
            }
        }

        #[test]
        fn any_bytes_are_a_message_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = Message::read(&mut &bytes[..]) {
                prop_assert_eq!(&message.bytes()[..], &bytes[..message.bytes().len()]);
                let _ = message.into_told();
            }
            let _ = (failure_of(&bytes), devices_of(&bytes), digest_of(&bytes), absent_of(&bytes));
            if let Ok(hello) = <&[u8; HELLO_BYTES]>::try_from(&bytes[..]) {
                prop_assert_eq!(Hello::read(hello).map(|hello| hello.bytes()).unwrap_or(*hello), *hello);
            }
        }

        #[test]
        fn nearly_devices_are_devices_or_an_error(
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
        ) {
            let mut bytes = devices_bytes(&[device("cuda:0", 1 << 40, 2 << 20)]).unwrap();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(devices) = devices_of(&bytes) {
                prop_assert!(devices_bytes(&devices).is_ok());
            }
        }
    }
}
