//! What ends a program, and what is left of it: nothing.

use std::time::Duration;

use tightfit::policy::Proposal;

use super::*;
use types::{Format, Placement};
use wit_checkpoints::Host as _;
use wit_devices::Host as _;
use wit_models::HostModel as _;
use wit_nf4::Host as _;

/// The cause of a trap.
#[track_caller]
fn cause<E: std::error::Error + Copy + Send + Sync + 'static, T: std::fmt::Debug>(
    result: Result<T, CallError>,
) -> E {
    match result {
        Err(CallError::Trap(trap)) => *trap.downcast_ref::<E>().expect("it has this cause"),
        other => panic!("it did not trap: {other:?}"),
    }
}

fn whole(placements: &[tightfit::types::Placement]) -> Proposal {
    Proposal {
        placements: placements.to_vec(),
        headroom: vec![0, 0],
        slices: Vec::new(),
    }
}

#[test]
fn after_the_deadline_every_call_but_those_that_free_traps() {
    let directory = checkpoint();
    let mut program = with_model(directory.path(), 16 * MIB);
    let buffer = program.allocate(0, 100);
    let open = program.open("model");
    let placement = Placement {
        device: Some(0),
        format: Format::Stored,
    };
    let model = done(
        program
            .call()
            .load(again(&open), vec![placement; 4], vec![0, 0]),
    );
    program.context.set_deadline(Instant::now());
    let trap = CallError::Trap;
    let b = || again(&buffer);
    let p = || place(&buffer, 0);
    let o = || again(&open);
    let m = || again(&model);
    let (bf16, nf4) = (types::Dtype::Bf16, types::QuantType::Nf4);
    let data = wit_models::PartKind::Data;
    let view = &mut program.call();
    let ends: Vec<Stopped> = vec![
        cause(view.get_devices().map_err(trap)),
        cause(view.get_usage(0)),
        cause(view.get_quota().map_err(trap)),
        cause(view.allocate(0, 1)),
        cause(view.length(b()).map_err(trap)),
        cause(view.device(b()).map_err(trap)),
        cause(view.read(b(), 0, 1)),
        cause(view.write(b(), 0, vec![1])),
        cause(view.copy_from(b(), 0, b(), 50, 1)),
        cause(view.quantize(p(), bf16, 2, 64, p(), p())),
        cause(view.quantize_bytes(vec![], bf16, 64, p(), p())),
        cause(wit_nf4::Host::dequantize(
            view,
            nf4,
            p(),
            p(),
            2,
            64,
            bf16,
            p(),
        )),
        cause(view.quantize_absmax(p(), 1, p(), p())),
        cause(view.dequantize_absmax(p(), p(), 0.0, 1, p())),
        cause(view.get_names().map_err(trap)),
        cause(view.open("model".to_owned())),
        cause(view.config_json(o()).map_err(trap)),
        cause(view.tensor_count(o()).map_err(trap)),
        cause(view.tensors(o(), 0, 1).map_err(trap)),
        cause(wit_checkpoints::HostCheckpoint::find(view, o(), String::new()).map_err(trap)),
        cause(view.ties(o(), 0, 1).map_err(trap)),
        cause(wit_checkpoints::HostCheckpoint::read_tensor(
            view,
            o(),
            0,
            0,
            1,
            b(),
            0,
        )),
        cause(view.companion_bytes(o(), "vocab.json".to_owned())),
        cause(view.read_companion(o(), "vocab.json".to_owned(), 0, 1)),
        cause(view.load(o(), vec![], vec![])),
        cause(wit_sliced_models::Host::load(
            view,
            o(),
            vec![],
            vec![],
            vec![],
        )),
        cause(wit_sliced_models::Host::get_piece(view, m(), 0)),
        cause(view.get_statistics(m()).map_err(trap)),
        cause(wit_models::HostModel::find(view, m(), String::new()).map_err(trap)),
        cause(view.get_tensor(m(), 0)),
        cause(view.read_part(m(), 0, data, 0, 1)),
        cause(view.read_part_into(m(), 0, data, 0, 1, b(), 0)),
        cause(view.read_elements(m(), 0, 0, 1, bf16)),
        cause(view.read_elements_into(m(), 0, 0, 1, bf16, b(), 0)),
    ];
    assert!(ends.iter().all(|&end| end == Stopped::Deadline), "{ends:?}");
    // To free something is never refused.
    program.free(buffer);
    program.unload(model);
    program.close(open);
    assert_eq!(program.usage().requested.now, 0);
}

#[test]
fn a_deadline_in_the_future_is_none_yet() {
    let mut program = Program::new(MIB);
    program
        .context
        .set_deadline(Instant::now() + Duration::from_secs(86_400));
    program.allocate(0, 1);
}

#[test]
fn a_load_that_is_cancelled_takes_nothing() {
    let directory = checkpoint();
    let token = CancelToken::new();
    let devices = devices();
    let context = ProgramCtx::new(Arc::clone(&devices), 64 * MIB)
        .grant("model", directory.path())
        .cancelled_by(token.clone())
        .load_with(Some(1), Some(64 << 10));
    let mut program = Program::with(context);
    let checkpoint = tightfit::checkpoint::Checkpoint::open(directory.path()).unwrap();
    token.cancel();
    // Not at the start of the call, where it would not have been begun.
    let placement = tightfit::types::Placement {
        device: Some(0),
        format: tightfit::types::Format::Stored,
    };
    let result = program.context.load(&checkpoint, &whole(&[placement; 4]));
    assert_eq!(cause::<Stopped, _>(result), Stopped::Cancelled);
    assert_eq!(program.context.reserved().peak, 0);
    assert_eq!(devices[0].usage().reserved.peak, 0);
    assert_eq!(
        cause::<Stopped, _>(program.call().allocate(0, 1)),
        Stopped::Cancelled
    );
}

/// A checkpoint of this many empty tensors.
fn empty_tensors(count: usize) -> tempfile::TempDir {
    let directory = tempfile::TempDir::new().unwrap();
    let entry = |i| format!(r#""t{i}.weight":{{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}}"#);
    let entries: Vec<String> = (0..count).map(entry).collect();
    let header = format!("{{{}}}", entries.join(","));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    std::fs::write(directory.path().join("model.safetensors"), bytes).unwrap();
    directory
}

#[test]
fn a_deadline_ends_opening_and_planning_in_the_middle() {
    const TENSORS: usize = 20_000;
    let directory = empty_tensors(TENSORS);
    let mut program = with_model(directory.path(), 16 * MIB);
    let open = program.open("model");
    let OpenCheckpoint(checkpoint) = program.table.get(&open).unwrap();
    let checkpoint = Arc::clone(checkpoint);
    let placement = tightfit::types::Placement {
        device: Some(0),
        format: tightfit::types::Format::Stored,
    };
    let placements = vec![placement; TENSORS];
    program.context.set_deadline(Instant::now());
    // Not at the start of the calls, where they would not have been begun.
    let result = program.context.load(&checkpoint, &whole(&placements));
    assert_eq!(cause::<Stopped, _>(result), Stopped::Deadline);
    let mut program = with_model(directory.path(), 16 * MIB);
    program.context.set_deadline(Instant::now());
    let ProgramCtx { grants, stop, .. } = &mut program.context;
    let result = grants.open("model".to_owned(), stop);
    assert_eq!(cause::<Stopped, _>(result), Stopped::Deadline);
    // And a token that is used.
    let token = CancelToken::new();
    let context = ProgramCtx::new(devices(), 16 * MIB)
        .grant("model", directory.path())
        .cancelled_by(token.clone());
    let mut program = Program::with(context);
    token.cancel();
    let ProgramCtx { grants, stop, .. } = &mut program.context;
    let result = grants.open("model".to_owned(), stop);
    assert_eq!(cause::<Stopped, _>(result), Stopped::Cancelled);
}

#[test]
fn clearing_what_lies_before_is_interrupted() {
    let mut program = Program::new(8 * MIB);
    let buffer = program.allocate(0, 8 * MIB);
    program.context.stop.cancel.cancel();
    let stop = program.context.stop.clone();
    let buffer = program.table.get_mut(&buffer).unwrap();
    let error = buffer.write(4 * MIB, &[1], &stop).unwrap_err();
    assert!(matches!(
        error,
        crate::memory::MemoryError::Stopped(Stopped::Cancelled)
    ));
    let mut bytes = vec![1; 8 << 20];
    buffer.read(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0));
}

#[test]
fn handles_are_limited_and_what_finds_no_place_is_given_back() {
    let directory = checkpoint();
    let mut program = with_model(directory.path(), 16 * MIB);
    program.table.set_max_capacity(2);
    let _open = program.open("model");
    let buffer = program.allocate(0, 100);
    let usage = program.usage();
    let full = |result: Result<(), CallError>| match result {
        Err(CallError::Trap(trap)) => {
            matches!(trap.downcast_ref(), Some(ResourceTableError::Full))
        }
        _ => false,
    };
    assert!(full(program.call().allocate(0, 100).map(drop)));
    assert!(full(program.call().open("model".to_owned()).map(drop)));
    assert_eq!(program.usage().requested.now, usage.requested.now);
    program.free(buffer);
    program.allocate(0, 100);
}

#[test]
fn stale_handles_and_handles_of_another_kind_are_traps() {
    let directory = checkpoint();
    let mut program = with_model(directory.path(), 16 * MIB);
    let buffer = program.allocate(0, 100);
    let open = program.open("model");
    let forged: Resource<Buffer> = Resource::new_borrow(open.rep());
    assert!(matches!(
        program.call().read(forged, 0, 1),
        Err(CallError::Trap(_))
    ));
    let stale = again(&buffer);
    program.free(buffer);
    assert!(matches!(
        program.call().read(again(&stale), 0, 1),
        Err(CallError::Trap(_))
    ));
    let twice: Resource<Buffer> = Resource::new_own(stale.rep());
    assert!(wit_buffers::HostBuffer::drop(&mut program.call(), twice).is_err());
}

#[test]
fn whatever_is_left_behind_goes_with_the_table() {
    let directory = checkpoint();
    let devices = devices();
    let mut program = Program::with(
        ProgramCtx::new(Arc::clone(&devices), 32 * MIB).grant("model", directory.path()),
    );
    for _ in 0..100 {
        let buffer = program.allocate(1, 10_000);
        done(program.call().write(again(&buffer), 5000, vec![1; 5000]));
    }
    let open = program.open("model");
    let placement = Placement {
        device: Some(0),
        format: Format::Stored,
    };
    done(program.call().load(open, vec![placement; 4], vec![0, 0]));
    assert!(devices.iter().all(|device| device.usage().reserved.now > 0));
    // In either order.
    let Program { context, table } = program;
    drop(context);
    drop(table);
    for device in devices.iter() {
        assert_eq!(device.usage().reserved.now, 0);
    }
}
