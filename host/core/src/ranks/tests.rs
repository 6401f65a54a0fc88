//! Ranks as threads of one process, over the loopback interface.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use tightfit_common::names::layer_of;

use super::message::{Hello, Kind, MAX_PAYLOAD, Message, Step};
use super::*;
use crate::cancel::CancelToken;
use crate::checkpoint::Checkpoint;
use crate::device::{Device, DeviceInfo, HostDevice, WorldDevices};
use crate::load::{LoadOptions, Reserved, load, load_reserved};
use crate::model::{Model, Tensor};
use crate::plan::Plan;
use crate::policy::Proposal;
use crate::status::Status;
use crate::synth::{Preset, SynthOptions, write};
use crate::testing::{device, source, write_checkpoint};
use crate::types::{DType, Format, Placement};

/// A world whose rank 0 listens already.
struct Meeting {
    listener: TcpListener,
    address: Rendezvous,
    size: u32,
    timeout: Duration,
}

impl Meeting {
    fn of(size: u32) -> Meeting {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        Meeting {
            listener,
            address: Rendezvous {
                host: "127.0.0.1".to_owned(),
                port,
            },
            size,
            timeout: Duration::from_secs(30),
        }
    }

    fn world(&self, rank: u32) -> World {
        World {
            rank,
            size: self.size,
            local_rank: rank,
            local_size: self.size,
            rendezvous: Some(self.address.clone()),
        }
    }

    fn join(&self, rank: u32) -> Result<Group, RankError> {
        self.join_with(rank, &CancelToken::new())
    }

    fn join_with(&self, rank: u32, cancel: &CancelToken) -> Result<Group, RankError> {
        let options = JoinOptions::default()
            .with_timeout(self.timeout)
            .with_cancel(cancel.clone());
        match rank {
            0 => Group::host(&self.world(0), &self.listener, &self.address, &options),
            _ => Group::join(&self.world(rank), &self.address, &options),
        }
    }

    /// What comes of every rank.
    fn run<T: Send>(&self, each: impl Fn(u32, Result<Group, RankError>) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let each = &each;
            let ranks: Vec<_> = (0..self.size)
                .map(|rank| scope.spawn(move || each(rank, self.join(rank))))
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    fn stranger(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.address.port)).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        stream
    }

    /// Somebody who knows the protocol and comes as this rank.
    fn impostor(&self, rank: u32) -> TcpStream {
        let mut stream = self.stranger();
        stream
            .write_all(&Hello::new(self.size, rank).bytes())
            .unwrap();
        stream
    }
}

/// Whether the other end has ended a connection, after reading what it sent.
fn is_ended(stream: &mut TcpStream) -> bool {
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).is_ok() || rest.len() < 100
}

fn own(rank: u32) -> Vec<DeviceInfo> {
    vec![device("sim:0", 100 + u64::from(rank), 1)]
}

fn digest(byte: u8) -> PlanDigest {
    let part = Digest::from([byte; 32]);
    PlanDigest {
        whole: part,
        checkpoint: Digest::from([0; 32]),
        devices: Digest::from([0; 32]),
        placements: part,
    }
}

/// All ends are the same sentence.
#[track_caller]
fn all_say(outcomes: &[Result<(), RankError>], part: &str) -> RankError {
    let sentences: Vec<String> = outcomes
        .iter()
        .map(|outcome| outcome.as_ref().unwrap_err().to_string())
        .collect();
    assert!(
        sentences.iter().all(|sentence| *sentence == sentences[0]),
        "{sentences:#?}"
    );
    assert!(sentences[0].contains(part), "{}", sentences[0]);
    outcomes[0].clone().unwrap_err()
}

#[test]
fn ranks_take_every_step_together() {
    for size in [2, 3, 7] {
        let meeting = Meeting::of(size);
        let told = meeting.run(|rank, group| {
            let group = group?;
            let told = group.devices(Ok(&own(rank)))?;
            group.agree(Ok(&digest(1)))?;
            group.reserved(Ok(()))?;
            let token = CancelToken::new();
            group.cancel_on_loss(&token);
            group.loaded(Ok(()))?;
            assert!(!token.is_cancelled());
            assert_eq!(group.turned_away(), 0);
            Ok::<_, RankError>(told)
        });
        let expected: Vec<_> = (0..size).map(own).collect();
        for told in told {
            assert_eq!(told.unwrap(), expected);
        }
    }
}

#[test]
fn the_order_in_which_ranks_come_does_not_matter() {
    let mut meeting = Meeting::of(3);
    // Rank 0 listens last: others find nobody there, or somebody who does not answer yet.
    let (listener, free) = (
        meeting.listener.try_clone().unwrap(),
        Meeting::of(1).listener,
    );
    drop(std::mem::replace(&mut meeting.listener, free));
    drop(listener);
    let joined = std::thread::scope(|scope| {
        let meeting = &meeting;
        let late = scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            let options = JoinOptions::default().with_timeout(meeting.timeout);
            Group::join(&meeting.world(0), &meeting.address, &options)?.reserved(Ok(()))
        });
        let early = [1, 2].map(|rank| scope.spawn(move || meeting.join(rank)?.reserved(Ok(()))));
        let mut joined = vec![late.join().unwrap()];
        joined.extend(early.map(|rank| rank.join().unwrap()));
        joined
    });
    for outcome in joined {
        outcome.unwrap();
    }
}

#[test]
fn a_rank_that_cannot_go_on_ends_all_with_its_sentence() {
    let outcomes = Meeting::of(3).run(|rank, group| {
        let group = group?;
        let failure = Failure::new(Status::Checkpoint, &"there is no model");
        match rank {
            1 => group.devices(Err(failure)).map(|_| ()),
            _ => group.devices(Ok(&own(rank))).map(|_| ()),
        }
    });
    let error = all_say(&outcomes, "rank 1: there is no model");
    assert_eq!(Status::from(&error), Status::Checkpoint);
    // What all refuse is not of one of them.
    let outcomes = Meeting::of(3)
        .run(|_, group| group?.agree(Err(Failure::new(Status::DoesNotFit, &"it does not fit"))));
    let error = all_say(&outcomes, "it does not fit");
    assert!(matches!(error, RankError::AllFailed { .. }), "{error}");
    // And what two do is of the first.
    let outcomes = Meeting::of(3).run(|rank, group| {
        let failure = Failure::new(Status::Device, &format!("no memory on {rank}"));
        group?.reserved(if rank == 0 { Ok(()) } else { Err(failure) })
    });
    all_say(&outcomes, "rank 1: no memory on 1");
}

#[test]
fn it_is_said_what_differs() {
    let files = |other: bool| PlanDigest {
        checkpoint: Digest::from([other.into(); 32]),
        ..digest(other.into())
    };
    let devices = |other: bool| PlanDigest {
        devices: Digest::from([other.into(); 32]),
        ..digest(other.into())
    };
    let agreed = |of: &(dyn Fn(bool) -> PlanDigest + Sync)| {
        Meeting::of(4).run(|rank, group| group?.agree(Ok(&of(rank == 2))))
    };
    let error = all_say(&agreed(&files), "rank 2 sees other files than rank 0");
    assert!(error.to_string().contains("010101010101"), "{error}");
    all_say(&agreed(&devices), "rank 2 counts with other devices");
    all_say(
        &agreed(&|other| digest(other.into())),
        "rank 2 has made another plan",
    );
}

#[test]
fn a_rank_that_ends_cancels_the_others_loads() {
    for dying in [0, 2] {
        let start = Instant::now();
        let outcomes = Meeting::of(3).run(|rank, group| {
            let group = group.unwrap();
            group.reserved(Ok(())).unwrap();
            if rank == dying {
                // As a process that is killed leaves it.
                return None;
            }
            let token = CancelToken::new();
            group.cancel_on_loss(&token);
            // The load, which looks at its token.
            while !token.is_cancelled() {
                assert!(
                    start.elapsed() < Duration::from_secs(20),
                    "nobody said anything"
                );
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(group.trouble().is_some());
            // Its own end does not hide the cause.
            let cancelled = Failure::new(Status::Interrupted, &"cancelled");
            Some(group.loaded(Err(cancelled)))
        });
        let outcomes: Vec<_> = outcomes.into_iter().flatten().collect();
        assert_eq!(outcomes.len(), 2);
        let sentence = format!("rank {dying} has ended before its share was loaded");
        let error = all_say(&outcomes, &sentence);
        assert_eq!(error, RankError::Lost { rank: dying });
    }
}

#[test]
fn a_rank_that_fails_while_it_loads_is_not_waited_for() {
    for failing in [0, 1] {
        let outcomes = Meeting::of(3).run(|rank, group| {
            let group = group?;
            group.reserved(Ok(()))?;
            let token = CancelToken::new();
            group.cancel_on_loss(&token);
            if rank == failing {
                return group.loaded(Err(Failure::new(
                    Status::Checkpoint,
                    &"the file was cut short",
                )));
            }
            if rank == 2 {
                // Still loading.
                while !token.is_cancelled() {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            group.loaded(Ok(()))
        });
        all_say(
            &outcomes,
            &format!("rank {failing}: the file was cut short"),
        );
    }
}

#[test]
fn strangers_are_turned_away_and_counted() {
    let meeting = Meeting::of(2);
    let mut silent = meeting.stranger();
    let mut rubbish = meeting.stranger();
    rubbish.write_all(&[b'x'; 4096]).unwrap();
    let mut short = meeting.stranger();
    short.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    short.shutdown(Shutdown::Write).unwrap();
    let gone = meeting.stranger();
    drop(gone);
    let mut of_others = Vec::new();
    for (size, rank) in [(3, 1), (2, 0), (2, 2), (2, u32::MAX)] {
        let mut stranger = meeting.stranger();
        stranger.write_all(&Hello::new(size, rank).bytes()).unwrap();
        of_others.push(stranger);
    }
    let outcomes = meeting.run(|rank, group| {
        let group = group?;
        group.devices(Ok(&own(rank)))?;
        let turned_away = group.turned_away();
        group.loaded(Ok(())).map(|()| turned_away)
    });
    let turned_away: Vec<u64> = outcomes.into_iter().map(Result::unwrap).collect();
    assert_eq!(turned_away, [8, 0]);
    for stranger in [&mut silent, &mut rubbish, &mut short]
        .into_iter()
        .chain(&mut of_others)
    {
        assert!(is_ended(stranger));
    }
}

#[test]
fn a_place_is_taken_once_and_free_again_when_its_holder_leaves() {
    let meeting = Meeting::of(3);
    let first = meeting.impostor(1);
    let outcomes = std::thread::scope(|scope| {
        let meeting = &meeting;
        let join = |rank| scope.spawn(move || meeting.join(rank)?.reserved(Ok(())));
        let early = [join(0), join(1)];
        // Rank 1 finds its place taken, and comes again.
        std::thread::sleep(Duration::from_millis(500));
        assert!(early.iter().all(|rank| !rank.is_finished()));
        drop(first);
        std::thread::sleep(Duration::from_millis(500));
        let [zero, one] = early;
        [zero, one, join(2)].map(|rank| rank.join().unwrap())
    });
    for outcome in outcomes {
        outcome.unwrap();
    }
}

#[test]
fn rubbish_from_a_rank_ends_all() {
    let told = |step, rank, payload: &[u8]| Message {
        step,
        payload: payload.to_vec(),
        ..Message::of(Kind::Told, rank)
    };
    let mut too_long = Message::of(Kind::Told, 1).bytes();
    too_long[6..10].copy_from_slice(&(MAX_PAYLOAD as u32 + 1).to_le_bytes());
    let cases: [(&str, Vec<u8>); 6] = [
        ("an unknown kind", vec![0xff; 100]),
        ("too long", too_long),
        (
            "a rank that it knows nothing of",
            told(Step::Devices, 0, b"[]").bytes(),
        ),
        (
            "the same again",
            [
                told(Step::Load, 1, b"").bytes(),
                told(Step::Load, 1, b"").bytes(),
            ]
            .concat(),
        ),
        ("only rank 0 sends", Message::of(Kind::Lost, 1).bytes()),
        ("expected", told(Step::Devices, 1, b"[{}]").bytes()),
    ];
    for (part, bytes) in cases {
        let meeting = Meeting::of(3);
        let outcomes: Vec<Result<(), RankError>> = std::thread::scope(|scope| {
            let meeting = &meeting;
            let mut impostor = meeting.impostor(1);
            let ranks = [0, 2].map(|rank| {
                scope.spawn(move || meeting.join(rank)?.devices(Ok(&own(rank))).map(|_| ()))
            });
            impostor.write_all(&bytes).unwrap();
            let outcomes = ranks.map(|rank| rank.join().unwrap());
            assert!(is_ended(&mut impostor));
            outcomes.into()
        });
        // One of them may be the parser's.
        let sentence = outcomes[0].as_ref().unwrap_err().to_string();
        assert!(
            sentence.starts_with("rank 1") && sentence.contains("makes no sense"),
            "{sentence}"
        );
        assert!(
            part == "expected" || sentence.contains(part),
            "{part}: {sentence}"
        );
        all_say(&outcomes, "makes no sense");
    }
}

#[test]
fn a_rank_that_says_nothing_is_not_waited_for_for_ever() {
    let mut meeting = Meeting::of(3);
    meeting.timeout = Duration::from_secs(1);
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let meeting = &meeting;
        let _silent = meeting.impostor(2);
        let ranks = [0, 1].map(|rank| scope.spawn(move || meeting.join(rank)?.reserved(Ok(()))));
        ranks.map(|rank| rank.join().unwrap()).into()
    });
    let error = all_say(&outcomes, "rank 2 has not answered within 1 s");
    assert_eq!(
        error,
        RankError::Late {
            rank: 2,
            seconds: 1
        }
    );
}

#[test]
fn who_does_not_come_is_named_by_all_that_have() {
    let mut meeting = Meeting::of(4);
    meeting.timeout = Duration::from_secs(1);
    let mut stranger = meeting.stranger();
    stranger.write_all(&[0; 200]).unwrap();
    let outcomes: Vec<Result<(), RankError>> = std::thread::scope(|scope| {
        let meeting = &meeting;
        let ranks = [0, 2].map(|rank| scope.spawn(move || meeting.join(rank).map(|_| ())));
        ranks.map(|rank| rank.join().unwrap()).into()
    });
    let error = all_say(&outcomes, "ranks 1, 3 have not come to 127.0.0.1:");
    assert!(
        error
            .to_string()
            .contains("; 1 connection of somebody else"),
        "{error}"
    );
    // Where nobody listens, the others say so.
    let mut nobody = Meeting::of(2);
    nobody.timeout = Duration::from_millis(300);
    let address = nobody.address.clone();
    drop(nobody.listener);
    let world = World {
        rank: 1,
        size: 2,
        local_rank: 1,
        local_size: 2,
        rendezvous: None,
    };
    let options = JoinOptions::default().with_timeout(nobody.timeout);
    let error = Group::join(&world, &address, &options).unwrap_err();
    assert!(matches!(error, RankError::Unreachable { .. }), "{error}");
}

#[test]
fn a_rank_of_another_world_is_told_so() {
    let meeting = Meeting::of(2);
    let other = World {
        rank: 1,
        size: 3,
        local_rank: 1,
        local_size: 3,
        rendezvous: None,
    };
    std::thread::scope(|scope| {
        let meeting = &meeting;
        let first = scope.spawn(move || meeting.join(0)?.reserved(Ok(())));
        let error = Group::join(&other, &meeting.address, &JoinOptions::default()).unwrap_err();
        assert!(
            error.to_string().contains("a world of another size"),
            "{error}"
        );
        // The right one may still come.
        meeting.join(1).unwrap().reserved(Ok(())).unwrap();
        first.join().unwrap().unwrap();
    });
}

#[test]
fn waiting_is_cancelled() {
    let cancel = CancelToken::new();
    let meeting = Meeting::of(2);
    std::thread::scope(|scope| {
        let (meeting, cancel) = (&meeting, &cancel);
        let host = scope.spawn(move || meeting.join_with(0, cancel).map(|_| ()));
        std::thread::sleep(Duration::from_millis(50));
        cancel.cancel();
        assert_eq!(host.join().unwrap(), Err(RankError::Cancelled));
    });
    let cancel = CancelToken::new();
    let meeting = Meeting::of(2);
    std::thread::scope(|scope| {
        let (meeting, cancel) = (&meeting, &cancel);
        let host = scope.spawn(move || meeting.join(0)?.reserved(Ok(())));
        let group = meeting.join_with(1, cancel).unwrap();
        cancel.cancel();
        // Rank 0 is at another step. The other hears that it has left.
        assert_eq!(group.agree(Ok(&digest(1))), Err(RankError::Cancelled));
        drop(group);
        assert_eq!(host.join().unwrap(), Err(RankError::Lost { rank: 1 }));
    });
}

#[test]
fn shares_of_all_ranks_are_the_plan() {
    let directory = tempfile::tempdir().unwrap();
    let names = ["a.weight", "b.weight", "c.weight", "d.weight", "e.weight"];
    write_checkpoint(
        directory.path(),
        &names.map(|name| source(name, DType::Bf16, &[64, 64])),
    );
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let devices = ["0/sim:0", "1/sim:0", "1/cpu"].map(|name| device(name, 1 << 20, 4096));
    let placements: Vec<Placement> = [Some(0), Some(2), Some(1), None, Some(2)]
        .map(|device| Placement {
            device,
            format: Format::NF4_DOUBLE,
        })
        .into();
    let plan = Plan::new(checkpoint.tensors(), &[], &devices, &placements, &[0; 3]).unwrap();
    let shares = [[true, false, false], [false, true, true]].map(|keep| plan.share(&keep));
    assert_eq!(shares[0].devices, plan.devices[..1]);
    assert_eq!(shares[1].devices, plan.devices[1..]);
    for (index, whole) in plan.tensors.iter().enumerate() {
        let held = shares.iter().map(|share| &share.tensors[index]);
        let held: Vec<_> = held
            .filter(|part| part.placement.device.is_some())
            .collect();
        assert_eq!(held.len(), usize::from(whole.placement.device.is_some()));
        assert!(held.iter().all(|held| held.parts == whole.parts));
    }
}

/// What is stored of every tensor that a model has.
fn stored(model: &Model) -> BTreeMap<String, Vec<Vec<u8>>> {
    let parts = |tensor: Tensor<'_>| {
        let kinds = tensor.parts().iter().map(|part| part.kind);
        let bytes = kinds.map(|kind| tensor.read_part(kind).unwrap().unwrap());
        (tensor.name().to_owned(), bytes.collect())
    };
    model.tensors().map(parts).collect()
}

#[test]
fn all_that_ranks_load_is_what_one_process_loads() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m");
    write(Preset::Demo, &path, &SynthOptions::default()).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let size = 4;
    // Layer by layer to one rank after the other, as for a pipeline; experts of a layer stay together.
    let tensors = checkpoint.tensors();
    let placements: Vec<Placement> = tensors
        .iter()
        .map(|tensor| {
            let layer = layer_of(&tensor.name).map(|(_, layer)| layer);
            Placement {
                device: Some(layer.unwrap_or(0) % size),
                format: match tensor.shape.len() == 2 && layer.is_some() {
                    true => Format::NF4_DOUBLE,
                    false => Format::Stored,
                },
            }
        })
        .collect();
    let proposal = |placements: Vec<Placement>, devices: usize| Proposal {
        placements,
        headroom: vec![0; devices],
        slices: Vec::new(),
    };
    let alone: Vec<Box<dyn Device>> = vec![Box::new(HostDevice::sim(0, 1 << 30))];
    let on_one = placements.iter().map(|placement| Placement {
        device: Some(0),
        ..*placement
    });
    let proposed = proposal(on_one.collect(), 1);
    let whole = Plan::of(&checkpoint, &[alone[0].info()], &proposed).unwrap();
    let whole = load(&checkpoint, &whole, &alone, &LoadOptions::default()).unwrap();

    let specs = WorldDevices::new(&["sim:1GiB".parse().unwrap()], size).unwrap();
    let shares = Meeting::of(size).run(|rank, group| {
        let group = group.unwrap();
        // As a process of its own does.
        let checkpoint = Checkpoint::open(&path).unwrap();
        let devices = specs.open(rank, rank, size).unwrap();
        let infos: Vec<DeviceInfo> = devices.iter().map(|device| device.info()).collect();
        let told = group.devices(Ok(&infos)).unwrap();
        let all = specs.gathered(&told).unwrap();
        let all: Vec<DeviceInfo> = all.into_iter().map(|device| device.info).collect();
        let proposed = proposal(placements.clone(), all.len());
        let plan = Plan::of(&checkpoint, &all, &proposed).unwrap();
        group
            .agree(Ok(&PlanDigest::of(&checkpoint, &plan)))
            .unwrap();
        let share = plan.share(&specs.is_of(rank));
        let reserved = Reserved::take(share, &devices).unwrap();
        group.reserved(Ok(())).unwrap();
        let model = load_reserved(&checkpoint, reserved, &LoadOptions::default()).unwrap();
        group.loaded(Ok(())).unwrap();
        let peak = devices[0].usage().reserved.peak;
        assert_eq!(peak, plan.devices[rank as usize].size.reserved);
        (model.stats().bytes_read, stored(&model))
    });
    let read: u64 = shares.iter().map(|(read, _)| read).sum();
    assert_eq!(read, whole.stats().bytes_read);
    let mut union = BTreeMap::new();
    for (_, share) in shares {
        assert!(!share.is_empty());
        for (name, bytes) in share {
            assert!(union.insert(name, bytes).is_none());
        }
    }
    assert!(union == stored(&whole), "the bytes differ");
}
