use proptest::prelude::*;

use super::*;
use wit_devices::Host as _;

#[test]
fn a_buffer_holds_zeros_until_it_is_written() {
    let mut program = Program::new(8 * MIB);
    let buffer = program.allocate(0, 300 * KIB);
    assert_eq!(program.bytes(&buffer), vec![0; 300 << 10]);
    // Far from its beginning: what is between becomes zeros, not what was there.
    done(program.call().write(again(&buffer), 200 * KIB, vec![7; 3]));
    let mut expected = vec![0; 300 << 10];
    expected[200 << 10..][..3].fill(7);
    assert_eq!(program.bytes(&buffer), expected);
}

#[test]
fn memory_that_is_used_again_shows_nothing_of_what_was_there() {
    let devices = devices();
    let mut program = Program::on(&devices, 4 * MIB);
    for _ in 0..3 {
        let secret = program.buffer_of(&vec![0xa5; 700 << 10]);
        let reserved = program.usage().reserved.now;
        program.free(secret);
        let buffer = program.allocate(0, 700 * KIB);
        assert_eq!(
            program.usage().reserved.now,
            reserved,
            "it is the same memory"
        );
        done(program.call().write(again(&buffer), 699 * KIB, vec![1]));
        let bytes = program.bytes(&buffer);
        assert!(!bytes.contains(&0xa5));
        assert_eq!(bytes[699 << 10], 1);
        program.free(buffer);
    }
}

#[test]
fn the_quota_can_be_used_to_the_last_byte_and_no_further() {
    let mut program = Program::new(4 * MIB);
    let whole = program.allocate(1, 4 * MIB);
    let usage = program.context.usage(1).unwrap();
    assert_eq!(usage.reserved.now, 4 * MIB);
    assert_eq!(over_quota(program.call().allocate(0, 1)), (4 * KIB, 0));
    program.free(whole);
    assert_eq!(
        over_quota(program.call().allocate(0, 4 * MIB + 1)),
        (4 * MIB + 4 * KIB, 4 * MIB)
    );
    for bytes in [u64::MAX, u64::MAX - 255, u64::MAX - 4096] {
        let (need, _) = over_quota(program.call().allocate(0, bytes));
        assert!(need >= bytes);
    }
    // In pieces too, from one device what another had.
    for _ in 0..16 {
        program.allocate(0, 256 * KIB);
    }
    assert_eq!(program.usage().reserved.now, 4 * MIB);
    assert_eq!(program.context.reserved().peak, 4 * MIB);
}

#[test]
fn a_device_has_what_it_has() {
    let mut program = Program::new(u64::MAX);
    let errors::Error::NoSpace(shortage) = told(program.call().allocate(0, 65 * MIB)) else {
        panic!("it is something else");
    };
    assert_eq!((shortage.need, shortage.have), (65 * MIB, 64 * MIB));
    let message = invalid(program.call().allocate(2, 1));
    assert!(message.contains("there is no device 2"), "{message}");
    assert_eq!(program.usage(), Usage::default());
    assert_eq!(program.context.reserved(), Gauge::default());
}

#[test]
fn chunks_are_shared_grow_and_go_back() {
    let devices = devices();
    let mut program = Program::on(&devices, 32 * MIB);
    let buffers: Vec<_> = (0..4096).map(|_| program.allocate(0, 1000)).collect();
    let usage = program.usage();
    assert_eq!(usage.requested.now, 4096 * 1000);
    assert_eq!(usage.padded.now, 4096 * 1024);
    assert_eq!(usage.reserved.now, 4 * MIB);
    assert_eq!(devices[0].usage().reserved.now, 4 * MIB);
    for buffer in buffers {
        program.free(buffer);
    }
    let left = program.usage();
    assert_eq!((left.requested.now, left.padded.now), (0, 0));
    assert_eq!(left.reserved.now, MIB, "one is kept for the next buffer");
    // It gives way to whatever needs the quota.
    program.allocate(1, 32 * MIB);
    assert_eq!(program.usage().reserved.now, 0);
    assert_eq!(devices[0].usage().reserved.now, 0);
    drop(program);
    assert_eq!(devices[1].usage().reserved.now, 0);
}

#[test]
fn fragments_are_used_again() {
    let mut program = Program::new(MIB);
    let mut buffers: Vec<_> = (0..16)
        .map(|_| Some(program.allocate(0, 64 * KIB)))
        .collect();
    over_quota(program.call().allocate(0, 1));
    for buffer in buffers.iter_mut().step_by(2) {
        program.free(buffer.take().unwrap());
    }
    // Half of it is free, and no two pieces touch.
    over_quota(program.call().allocate(0, 64 * KIB + 1));
    for _ in 0..8 {
        program.allocate(0, 64 * KIB);
    }
    for buffer in buffers.into_iter().flatten() {
        program.free(buffer);
    }
    assert_eq!(program.usage().requested.now, 8 * 64 * KIB);
}

#[test]
fn ranges_lie_inside() {
    let mut program = Program::new(MIB);
    let buffer = program.allocate(0, 100);
    for (offset, bytes) in [(0, 101), (100, 1), (101, 0), (u64::MAX, 1), (1, u64::MAX)] {
        let message = invalid(program.call().read(again(&buffer), offset, bytes));
        assert!(message.contains("outside of a buffer of 100"), "{message}");
    }
    for (offset, bytes) in [(0, 101), (100, 1), (u64::MAX, 1), (u64::MAX, 0)] {
        invalid(program.call().write(again(&buffer), offset, vec![1; bytes]));
    }
    assert!(done(program.call().read(again(&buffer), 100, 0)).is_empty());
    done(program.call().write(again(&buffer), 100, vec![]));
    assert_eq!(program.bytes(&buffer), vec![0; 100]);

    let empty = program.allocate(0, 0);
    assert!(program.bytes(&empty).is_empty());
    done(program.call().write(again(&empty), 0, vec![]));
    invalid(program.call().write(again(&empty), 0, vec![1]));
}

#[test]
fn a_call_carries_at_most_4_mib() {
    let mut program = Program::new(16 * MIB);
    let buffer = program.allocate(0, 8 * MIB);
    let most = MOST_BYTES as u64;
    assert_eq!(
        done(program.call().read(again(&buffer), 0, most)).len(),
        MOST_BYTES
    );
    for message in [
        invalid(program.call().read(again(&buffer), 0, most + 1)),
        invalid(
            program
                .call()
                .write(again(&buffer), 0, vec![1; MOST_BYTES + 1]),
        ),
    ] {
        assert!(message.contains("at most 4194304"), "{message}");
    }
}

#[test]
fn copies_stay_on_a_device_and_do_not_overlap() {
    let mut program = Program::new(16 * MIB);
    let content: Vec<u8> = (0..3 * MIB + 5).map(|i| (i % 251) as u8).collect();
    let source = program.buffer_of(&content);
    let target = program.allocate(0, 3 * MIB);
    done(
        program
            .call()
            .copy_from(again(&target), 3, again(&source), 5, 3 * MIB - 3),
    );
    assert_eq!(program.bytes(&target)[..3], [0; 3]);
    assert_eq!(program.bytes(&target)[3..], content[5..][..(3 << 20) - 3]);

    let elsewhere = program.allocate(1, 100);
    let message = invalid(
        program
            .call()
            .copy_from(again(&elsewhere), 0, again(&source), 0, 10),
    );
    assert!(message.contains("on devices 0 and 1"), "{message}");
    let copy = |program: &mut Program, to, from, bytes| {
        let call = &mut program.call();
        call.copy_from(again(&source), to, again(&source), from, bytes)
    };
    assert_eq!(invalid(copy(&mut program, 10, 0, 11)), "the ranges overlap");
    done(copy(&mut program, 10, 0, 10));
    assert_eq!(program.bytes(&source)[10..20], content[..10]);
    for (to, from, bytes) in [
        (u64::MAX, 0, 1),
        (0, u64::MAX, 1),
        (0, 0, u64::MAX),
        (1, 0, 3 * MIB + 5),
    ] {
        assert!(invalid(copy(&mut program, to, from, bytes)).contains("outside"));
    }
}

#[test]
fn programs_do_not_see_each_other() {
    let devices = devices();
    let mut one = Program::on(&devices, 8 * MIB);
    let mut other = Program::on(&devices, 8 * MIB);
    let (seen, quota) = (
        other.call().get_devices().unwrap(),
        other.call().get_quota().unwrap(),
    );
    let secret = one.buffer_of(&vec![0xa5; 6 << 20]);
    assert_eq!(other.usage(), Usage::default());
    assert_eq!(
        format!("{:?}", other.call().get_devices().unwrap()),
        format!("{seen:?}")
    );
    assert_eq!(
        other.call().get_quota().unwrap().reserved.now,
        quota.reserved.now
    );
    // The one's handle is a number that means nothing to the other.
    assert!(matches!(
        other.call().read(again(&secret), 0, 1),
        Err(CallError::Trap(_))
    ));
    one.free(secret);
    drop(one);
    let buffer = other.allocate(0, 6 * MIB);
    assert!(other.bytes(&buffer).iter().all(|&byte| byte == 0));
}

#[test]
fn what_is_left_of_the_quota_is_what_a_device_has() {
    let mut program = Program::new(8 * MIB);
    let available = |program: &mut Program| program.call().get_devices().unwrap()[1].available;
    assert_eq!(available(&mut program), 8 * MIB);
    program.allocate(0, 3 * MIB);
    assert_eq!(available(&mut program), 5 * MIB);
    let usage = done(program.call().get_usage(0));
    assert_eq!(
        (usage.requested.now, usage.reserved.peak),
        (3 * MIB, 3 * MIB)
    );
    assert!(invalid(program.call().get_usage(2)).contains("no device 2"));
}

#[test]
fn what_others_take_and_free_does_not_show() {
    let devices = devices();
    let mut other = Program::on(&devices, 64 * MIB);
    let held = other.allocate(0, 10 * MIB);
    let mut program = Program::on(&devices, u64::MAX);
    let available = |program: &mut Program| program.call().get_devices().unwrap()[0].available;
    assert_eq!(available(&mut program), 54 * MIB);
    let more = other.allocate(0, 5 * MIB);
    assert_eq!(available(&mut program), 54 * MIB);
    other.free(held);
    other.free(more);
    drop(other);
    assert_eq!(available(&mut program), 54 * MIB);
    // What it takes itself does.
    let own = program.allocate(0, 8 * MIB);
    assert_eq!(available(&mut program), 46 * MIB);
    program.free(own);
    assert_eq!(available(&mut program), 46 * MIB, "the chunk is kept");
    // Where another has taken what was free, it is told when it asks for it.
    let mut other = Program::on(&devices, 64 * MIB);
    let _held = other.allocate(0, 50 * MIB);
    match told(program.call().allocate(0, 40 * MIB)) {
        errors::Error::NoSpace(shortage) => assert_eq!(shortage.need, 40 * MIB),
        other => panic!("it is something else: {other:?}"),
    }
    assert!(available(&mut program) > 40 * MIB);
}

proptest! {
    /// A buffer is an array of bytes, whatever else happens in the same memory.
    #[test]
    fn buffers_are_arrays_of_bytes(
        steps in prop::collection::vec((0u8..4, 0usize..4, 0u64..3000, 0u64..3000), 0..60)
    ) {
        let mut program = Program::new(64 * KIB);
        let mut live: Vec<Option<(Resource<Buffer>, Vec<u8>)>> = vec![None, None, None, None];
        for (index, (kind, slot, first, second)) in steps.into_iter().enumerate() {
            match (kind, live[slot].take()) {
                (0, None) => {
                    let buffer = program.allocate(0, first);
                    live[slot] = Some((buffer, vec![0; first as usize]));
                }
                (1, Some((buffer, _))) => program.free(buffer),
                (_, Some((buffer, mut model))) => {
                    let bytes = vec![index as u8 + 1; second as usize];
                    let result = program.call().write(again(&buffer), first, bytes.clone());
                    let place = model.get_mut(first as usize..).and_then(|m| m.get_mut(..bytes.len()));
                    prop_assert_eq!(result.is_ok(), place.is_some());
                    if let Some(place) = place {
                        place.copy_from_slice(&bytes);
                    }
                    live[slot] = Some((buffer, model));
                }
                (_, None) => {}
            }
            let mut requested = 0;
            for (buffer, model) in live.iter().flatten() {
                prop_assert_eq!(&program.bytes(buffer), model);
                requested += model.len() as u64;
            }
            let usage = program.usage();
            prop_assert_eq!(usage.requested.now, requested);
            prop_assert!(usage.requested.now <= usage.padded.now);
            prop_assert!(usage.padded.now <= usage.reserved.now);
            prop_assert!(usage.reserved.now <= 64 * KIB);
        }
    }
}
