//! What carries bytes to a device, used by hand.

use cuda_stand_in::control::{Setup, StandIn};
use tightfit::device::{
    CudaDevice, Device, DeviceError, Piece, Reservation, WRITER_BUFFERS, Writer,
};
use tightfit::memory::ReservationSize;

use super::{Driver, MIB, stand_in};

const LEN: usize = 4096;

fn reserve(device: &CudaDevice) -> Box<dyn Reservation> {
    let bytes = 2 * device.info().granularity;
    let size = ReservationSize {
        requested: bytes,
        padded: bytes,
        reserved: bytes,
    };
    device
        .reserve(size)
        .unwrap_or_else(|error| panic!("{error}"))
}

fn writer(reservation: &dyn Reservation) -> Box<dyn Writer> {
    let buffers = reservation.page_lock(WRITER_BUFFERS * LEN).unwrap();
    let buffers = buffers.expect("the processor cannot write it");
    reservation.writer(buffers).unwrap().unwrap()
}

fn to(offset: u64) -> [Piece; 1] {
    [Piece {
        start: 0,
        len: LEN,
        offset,
    }]
}

#[test]
fn pieces_arrive_where_they_are_sent() {
    let driver = Driver::start(1);
    let device = CudaDevice::open(0, None).unwrap();
    let reservation = reserve(&device);
    let mut writer = writer(&*reservation);
    for round in 0..5u8 {
        let buffer = writer.stage().unwrap();
        assert_eq!(buffer.len(), LEN);
        buffer[..LEN / 2].fill(2 * round);
        buffer[LEN / 2..].fill(2 * round + 1);
        let offset = u64::from(round) * LEN as u64;
        let half = |start: usize, offset| Piece {
            start,
            len: LEN / 2,
            offset,
        };
        // The halves change places.
        let middle = offset + LEN as u64 / 2;
        writer
            .write(&[half(0, middle), half(LEN / 2, offset)])
            .unwrap();
    }
    writer.finish().unwrap();
    let mut found = vec![0; 5 * LEN];
    reservation.read(0, &mut found).unwrap();
    for (index, half) in found.chunks(LEN / 2).enumerate() {
        let expected = index as u8 ^ 1;
        assert!(half.iter().all(|&byte| byte == expected), "{index}");
    }
    // The memory stays as long as somebody can write it.
    drop(reservation);
    writer.stage().unwrap().fill(9);
    writer.write(&to(0)).unwrap();
    drop((writer, device));
    driver.clean_report("writer");
}

#[test]
fn what_lies_outside_is_refused() {
    let driver = Driver::start(1);
    let device = CudaDevice::open(0, None).unwrap();
    let reservation = reserve(&device);
    let mut writer = writer(&*reservation);
    let (end, most) = (reservation.len(), usize::MAX);
    for (start, len, offset) in [
        (0, LEN, end - LEN as u64 + 1),
        (0, 1, end),
        (0, 1, u64::MAX),
        (1, LEN, 0),
        (LEN, 1, 0),
        (most, 1, 0),
        (1, most, 0),
    ] {
        writer.stage().unwrap();
        let result = writer.write(&[Piece { start, len, offset }]);
        assert!(
            matches!(result, Err(DeviceError::OutOfBounds { .. })),
            "{start} {len} {offset}: {result:?}"
        );
    }
    let mut byte = [0; 2];
    for offset in [end - 1, end, u64::MAX] {
        let result = reservation.read(offset, &mut byte);
        assert!(
            matches!(result, Err(DeviceError::OutOfBounds { .. })),
            "{result:?}"
        );
    }
    drop((writer, reservation, device));
    driver.clean_report("outside");
}

#[test]
fn a_buffer_is_filled_while_the_other_is_copied() {
    let Some(stand_in) = stand_in("its books", &Setup::default()) else {
        return;
    };
    let device = CudaDevice::open(0, None).unwrap();
    let reservation = reserve(&device);
    let mut writer = writer(&*reservation);
    for round in 0..3 {
        writer.stage().unwrap().fill(round);
        writer.write(&to(u64::from(round) * LEN as u64)).unwrap();
    }
    let calls = stand_in.report().calls;
    let of_copies: Vec<&str> = calls
        .iter()
        .map(String::as_str)
        .filter(|call| ["cuMemcpyHtoDAsync", "cuEventQuery"].contains(call))
        .collect();
    // Two are under way before the first is waited for.
    // Asked for twice: the stand-in is never done the first time.
    let (copy, ask) = ("cuMemcpyHtoDAsync", "cuEventQuery");
    assert_eq!(of_copies, [copy, copy, ask, ask, copy]);
    drop((writer, reservation, device));
    stand_in.report().is_clean("overlap");
}

#[test]
fn a_buffer_is_not_touched_after_an_error_before_what_is_under_way_is_over() {
    let calls = |setup: &Setup| -> Option<(StandIn, Vec<String>)> {
        let stand_in = stand_in("calls that fail", setup)?;
        let device = CudaDevice::open(0, None).unwrap();
        let reservation = reserve(&device);
        let mut writer = writer(&*reservation);
        writer.stage().unwrap().fill(1);
        let first = writer.write(&to(0));
        assert_eq!(first.is_err(), setup.fail_at.is_some());
        // The same buffer again where the first was not written to its end.
        for round in 2..5 {
            writer.stage().unwrap().fill(round);
            writer.write(&to(u64::from(round) * LEN as u64)).unwrap();
        }
        drop((writer, reservation, device));
        let report = stand_in.report();
        report.is_clean("after an error");
        Some((stand_in, report.calls))
    };
    let setup = Setup {
        devices: vec![64 * MIB],
        ..Setup::default()
    };
    let Some((stand_in, names)) = calls(&setup) else {
        return;
    };
    drop(stand_in);
    let record = names.iter().position(|call| call == "cuEventRecord");
    let setup = Setup {
        fail_at: record.map(|index| index as u64 + 1),
        ..setup
    };
    calls(&setup);
}

#[test]
fn an_empty_reservation_takes_nothing() {
    let driver = Driver::start(1);
    let device = CudaDevice::open(0, None).unwrap();
    let reservation = device.reserve(ReservationSize::default()).unwrap();
    assert!(reservation.is_empty());
    assert!(reservation.address().is_none());
    assert!(reservation.page_lock(LEN).unwrap().is_none());
    reservation.read(0, &mut []).unwrap();
    assert!(reservation.read(0, &mut [0]).is_err());
    drop((reservation, device));
    driver.clean_report("empty");
}
