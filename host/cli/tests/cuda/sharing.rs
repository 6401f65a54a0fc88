//! What applications use of a GPU's memory beside and after a model: parts, tails, tensors for other
//! libraries.

use tightfit::device::{Device, DeviceError, open_devices};
use tightfit::dlpack::DLDevice;
use tightfit::load::{LoadOptions, QuantizeOn, load, load_reserved, reserve_with};
use tightfit::plan::{PartKind, Plan, PlanOptions};
use tightfit::types::DType;
use tightfit_tests::loading::auto;

use super::{Driver, Kinds, MIB, decoder, in_small_pieces};

fn open(specs: &[&str]) -> Vec<Box<dyn Device>> {
    let specs: Vec<_> = specs.iter().map(|spec| spec.parse().unwrap()).collect();
    open_devices(&specs).unwrap_or_else(|error| panic!("{error}"))
}

fn reserved(device: &dyn Device) -> u64 {
    device.usage().reserved.now
}

#[test]
fn a_part_keeps_its_own_device_and_no_other() {
    let driver = Driver::start(2);
    let names = driver.devices();
    let names: Vec<&str> = names.iter().take(2).map(String::as_str).collect();
    let kinds = Kinds::new(Kinds::FEW);
    let devices = open(&names);
    let model = kinds.load(&devices, QuantizeOn::Cpu, 1).unwrap();
    // The tensors go to the devices in turn.
    let plain = model.tensor("bf16").unwrap();
    let bytes = plain.read_part(PartKind::Data).unwrap().unwrap();
    let part = plain.shared_part(PartKind::Data).unwrap();
    let borrowed = plain.device_part(PartKind::Data).unwrap();
    assert_eq!(part.address(), Some(borrowed.address()));
    assert!(part.address().unwrap().pointer.is_multiple_of(256));
    assert_eq!((part.bytes(), part.host()), (bytes.len() as u64, None));
    let exported = plain.to_dlpack(PartKind::Data).unwrap();
    let expected = DLDevice {
        device_type: 2,
        device_id: 0,
    };
    assert_eq!(exported.device(), expected);
    assert_eq!(exported.address(), borrowed.address().pointer);

    let kept = reserved(&*devices[plain.device()]);
    let first = plain.device();
    drop(model);
    for (index, device) in devices.iter().enumerate() {
        assert_eq!(reserved(&**device), if index == first { kept } else { 0 });
    }
    let mut copy = vec![0; bytes.len()];
    part.read(&mut copy).unwrap();
    assert_eq!(copy, bytes);
    drop(part);
    assert_eq!(reserved(&*devices[first]), kept);
    // From another thread, which has no context of the device.
    std::thread::spawn(move || drop(exported)).join().unwrap();
    assert_eq!(reserved(&*devices[first]), 0);
    drop(devices);
    driver.clean_report("parts");
}

#[test]
fn a_tail_lies_behind_the_weights_in_the_same_reservation() {
    let driver = Driver::start(1);
    let kinds = Kinds::new(Kinds::FEW);
    let devices = open(&["cuda:0"]);
    let infos = [devices[0].info()];
    let tensors = kinds.checkpoint.tensors();
    let without = kinds.plan(&devices);
    let placements: Vec<_> = without
        .tensors
        .iter()
        .map(|tensor| tensor.placement)
        .collect();
    let with_tail = PlanOptions::default().with_reserved_headroom(true);
    let plan = Plan::new_with(tensors, &[], &infos, &placements, &[3 * MIB], &with_tail).unwrap();
    let size = plan.devices[0].size;
    let model = load(
        &kinds.checkpoint,
        &plan,
        &devices,
        &in_small_pieces(QuantizeOn::Cpu, 1),
    )
    .unwrap();
    let usage = devices[0].usage();
    assert_eq!(
        (usage.reserved.now, usage.reserved.peak),
        (size.reserved, size.reserved)
    );

    // The addresses follow from where a weight is.
    let tensor = model.tensors().next().unwrap();
    let part = tensor.parts()[0];
    let start = tensor.device_part(part.kind).unwrap().address().pointer - part.offset;
    let tail = model.tail(0).unwrap();
    let first = tail.allocate(MIB).unwrap();
    let second = tail.allocate(2 * MIB).unwrap();
    let end = start + size.padded;
    assert_eq!(first.address().unwrap().pointer, end);
    assert_eq!(second.address().unwrap().pointer, end + MIB);
    assert_eq!((first.host(), first.address().unwrap().ordinal), (None, 0));
    let error = tail.allocate(1).unwrap_err();
    assert!(
        matches!(error, DeviceError::OutOfMemory { have: 0, .. }),
        "{error}"
    );

    drop(first);
    let cache = tail.allocate(MIB).unwrap();
    let cache = cache.into_dlpack(DType::F16, &[2, MIB / 4]).unwrap();
    assert_eq!(cache.address(), end);
    drop(model);
    drop(second);
    assert_eq!(reserved(&*devices[0]), size.reserved);
    drop(cache);
    assert_eq!(reserved(&*devices[0]), 0);
    drop(devices);
    driver.clean_report("tail");
}

#[test]
fn a_policys_headroom_becomes_the_tail() {
    let driver = Driver::start(1);
    let directory = decoder(3);
    let checkpoint = tightfit::checkpoint::Checkpoint::open(directory.path()).unwrap();
    let devices = open(&["cuda:0:64MiB"]);
    // Together they only fit in whole pages of the device.
    let settings = [("reserve".to_owned(), "1000001".to_owned())];
    let with_tail = PlanOptions::default().with_reserved_headroom(true);
    let placed = reserve_with(&checkpoint, auto(), &devices, &settings, &with_tail).unwrap();
    let plan = placed.reserved.plan().devices[0].clone();
    assert_eq!((plan.tail, plan.headroom), (1_000_192, 0));
    assert_eq!(reserved(&*devices[0]), plan.size.reserved);
    let model = load_reserved(&checkpoint, placed.reserved, &LoadOptions::default()).unwrap();
    assert_eq!(model.tail(0).unwrap().capacity(), 1_000_192);
    drop(model);
    assert_eq!(reserved(&*devices[0]), 0);
    drop(devices);
    driver.clean_report("headroom");
}
