//! A device's own kernels, used by hand.

use std::sync::Arc;

use cuda_stand_in::control::Setup;
use tightfit::device::{
    CudaDevice, Device, DeviceError, Piece, QuantizeJob, Quantizer, QuantizingWriter, Reservation,
    ScalePlace, ScalesJob, Staged, WRITER_BUFFERS, Workspace,
};
use tightfit::memory::ReservationSize;
use tightfit_kernels::cuda::SourceRun;
use tightfit_kernels::{BlockSize, FloatType, Kernels, SourceCodes};

use super::{Driver, stand_in};

const ELEMENTS: usize = 5000;
const BLOCKS: usize = ELEMENTS.div_ceil(64);
/// Where the workspace begins in the reservation, and how long it is.
const START: u64 = 64 << 10;
const LEN: u64 = 64 << 10;

/// Where scales, sums and the mean are in the workspace.
const SCALES: u64 = 24 << 10;
const SUMS: u64 = 32 << 10;
const MEAN: u64 = 48 << 10;

fn open() -> (CudaDevice, Box<dyn Reservation>, Arc<dyn Quantizer>) {
    let device = CudaDevice::open(0, None).unwrap_or_else(|error| panic!("{error}"));
    let reserved = device.info().granularity;
    let size = ReservationSize {
        requested: reserved,
        padded: reserved,
        reserved,
    };
    let reservation = device.reserve(size).unwrap();
    let workspace = Workspace::Within {
        offset: START,
        len: LEN,
    };
    let quantizer = reservation.quantizer(workspace).unwrap().unwrap();
    (device, reservation, quantizer)
}

/// One worker with buffers of so many bytes.
fn worker(
    reservation: &dyn Reservation,
    quantizer: &dyn Quantizer,
    buffer_bytes: usize,
) -> Box<dyn QuantizingWriter> {
    let buffers = reservation.page_lock(WRITER_BUFFERS * buffer_bytes);
    quantizer.worker(buffers.unwrap().unwrap()).unwrap()
}

fn job() -> QuantizeJob {
    QuantizeJob {
        staged: Staged::Floats(FloatType::F32),
        block_size: BlockSize::DEFAULT,
        elements: ELEMENTS,
        source: 0,
        codes: 0,
        absmax: ScalePlace::Workspace(SCALES),
        nonfinite: LEN - 8,
    }
}

/// Rows of 100 codes, of so many bytes, in four tiles.
fn coded(scales: usize, row_bytes: u64) -> Staged {
    Staged::Codes {
        float: FloatType::Bf16,
        run: SourceRun {
            codes: SourceCodes::F8E4M3,
            row_bytes,
            columns: 100,
            tile: [50, 50],
            first_row: 49,
            first_column: 0,
        },
        scales,
    }
}

fn scales_job() -> ScalesJob {
    ScalesJob {
        scales: BLOCKS,
        absmax: SCALES,
        sums: SUMS,
        mean: MEAN,
        codes: 4096,
        nested: 8192,
    }
}

/// Weights of two workers, each of other ones.
fn weights(worker: usize) -> Vec<f32> {
    (0..ELEMENTS)
        .map(|index| ((index * 7919 + worker * 31) % 1009) as f32 / 500.0 - 1.0)
        .collect()
}

fn fill(buffer: &mut [u8], weights: &[f32]) {
    for (bytes, weight) in buffer.chunks_exact_mut(4).zip(weights) {
        bytes.copy_from_slice(&weight.to_le_bytes());
    }
}

/// Says where bytes differ, and how.
#[track_caller]
fn assert_same(what: &str, have: &[u8], need: &[u8]) {
    let pairs = have.iter().zip(need).enumerate();
    let differ: Vec<_> = pairs.filter(|(_, (have, need))| have != need).collect();
    let (count, first) = (differ.len(), &differ[..differ.len().min(8)]);
    assert!(
        have == need,
        "{what}: {count} of {} bytes differ, first (index, (have, need)) {first:?}",
        need.len()
    );
}

#[test]
fn scales_are_quantized_after_what_other_workers_have_started() {
    let driver = Driver::start(1);
    let (device, reservation, quantizer) = open();
    quantizer.clear(0, LEN).unwrap();
    let mut one = worker(&*reservation, &*quantizer, 32 << 10);
    let mut other = worker(&*reservation, &*quantizer, 32 << 10);
    // Of what is quantized first, nothing has been waited for.
    fill(other.stage().unwrap(), &weights(0));
    other.quantize(&job()).unwrap();
    one.quantize_scales(&scales_job()).unwrap();
    other.finish().unwrap();

    let kernels = Kernels::detect();
    let source: Vec<u8> = weights(0).iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut codes = vec![0; ELEMENTS / 2];
    let mut absmax = vec![0.0; BLOCKS];
    kernels
        .quantize_nf4(
            &source,
            FloatType::F32,
            BlockSize::DEFAULT,
            &mut codes,
            &mut absmax,
        )
        .unwrap();
    let offset = kernels.absmax_mean(&absmax);
    let (mut scales, mut nested) = (vec![0; BLOCKS], [0.0]);
    kernels
        .quantize_absmax(&absmax, offset, &mut scales, &mut nested)
        .unwrap();

    let read = |offset, len| {
        let mut bytes = vec![0; len];
        reservation.read(offset, &mut bytes).unwrap();
        bytes
    };
    assert_same("codes", &read(0, ELEMENTS / 2), &codes);
    assert_same("scales", &read(4096, BLOCKS), &scales);
    assert_eq!(read(8192, 4), nested[0].to_le_bytes());
    let mut mean = [0; 4];
    quantizer.read(MEAN, &mut mean).unwrap();
    assert_eq!(f32::from_le_bytes(mean), offset);
    let mut nonfinite = [1; 8];
    quantizer.read(LEN - 8, &mut nonfinite).unwrap();
    assert_eq!(nonfinite, [0; 8]);
    drop((one, other, quantizer, reservation, device));
    driver.clean_report("by hand");
}

#[test]
fn two_workers_in_one_place_are_a_fault_in_the_books() {
    let Some(stand_in) = stand_in("its books", &Setup::default()) else {
        return;
    };
    let (device, reservation, quantizer) = open();
    let mut workers = [0, 1].map(|_| worker(&*reservation, &*quantizer, 32 << 10));
    for worker in &mut workers {
        fill(worker.stage().unwrap(), &weights(0));
        worker.quantize(&job()).unwrap();
    }
    let faults = stand_in.report().faults;
    assert!(
        faults.iter().any(|fault| fault.contains("races")),
        "{faults:?}"
    );
    drop((workers, quantizer, reservation, device));
}

#[test]
fn what_lies_outside_is_refused() {
    let driver = Driver::start(1);
    let (device, reservation, quantizer) = open();
    let end = reservation.len();
    let mut worker = worker(&*reservation, &*quantizer, 4 * ELEMENTS);
    let bad = [
        QuantizeJob {
            source: LEN - 4 * ELEMENTS as u64 + 1,
            ..job()
        },
        QuantizeJob {
            source: u64::MAX,
            ..job()
        },
        QuantizeJob {
            elements: usize::MAX,
            ..job()
        },
        // More than the buffer has.
        QuantizeJob {
            elements: ELEMENTS + 1,
            ..job()
        },
        QuantizeJob {
            codes: end - ELEMENTS as u64 / 2 + 1,
            ..job()
        },
        // Results where the kernels work.
        QuantizeJob {
            codes: START,
            ..job()
        },
        QuantizeJob {
            absmax: ScalePlace::Reservation(START - 4),
            ..job()
        },
        QuantizeJob {
            absmax: ScalePlace::Reservation(u64::MAX),
            ..job()
        },
        QuantizeJob {
            absmax: ScalePlace::Workspace(LEN),
            ..job()
        },
        QuantizeJob {
            nonfinite: LEN - 7,
            ..job()
        },
        // Scales behind the workspace, and codes.
        QuantizeJob {
            staged: coded(LEN as usize - 12, 100),
            ..job()
        },
        QuantizeJob {
            staged: coded(0, 1 << 20),
            ..job()
        },
        // Scales behind the buffer.
        QuantizeJob {
            staged: coded(4 * ELEMENTS - 12, 100),
            ..job()
        },
    ];
    for job in bad {
        worker.stage().unwrap();
        let result = worker.quantize(&job);
        assert!(
            matches!(result, Err(DeviceError::OutOfBounds { .. })),
            "{job:?}: {result:?}"
        );
    }
    let bad = [
        ScalesJob {
            absmax: LEN,
            ..scales_job()
        },
        ScalesJob {
            scales: usize::MAX,
            ..scales_job()
        },
        ScalesJob {
            sums: LEN - 8,
            ..scales_job()
        },
        ScalesJob {
            mean: LEN - 3,
            ..scales_job()
        },
        ScalesJob {
            codes: end,
            ..scales_job()
        },
        ScalesJob {
            nested: START + LEN - 1,
            ..scales_job()
        },
    ];
    for job in bad {
        let result = worker.quantize_scales(&job);
        assert!(
            matches!(result, Err(DeviceError::OutOfBounds { .. })),
            "{job:?}: {result:?}"
        );
    }
    let piece = |len, offset| Piece {
        start: 0,
        len,
        offset,
    };
    for (codes, scales) in [
        (piece(1, end), piece(4, 0)),
        (piece(1, 0), piece(4, LEN - 3)),
        (piece(1, 0), piece(4, u64::MAX)),
        (piece(4 * ELEMENTS + 1, 0), piece(4, 0)),
    ] {
        worker.stage().unwrap();
        let result = worker.write_scaled(&[codes], &scales);
        assert!(
            matches!(result, Err(DeviceError::OutOfBounds { .. })),
            "{codes:?} {scales:?}: {result:?}"
        );
    }
    for (offset, len) in [(LEN, 1), (0, LEN + 1), (u64::MAX, 2)] {
        assert!(quantizer.clear(offset, len).is_err());
    }
    assert!(quantizer.read(LEN - 1, &mut [0; 2]).is_err());
    for (offset, len) in [(end, 1), (0, end + 1), (u64::MAX, u64::MAX)] {
        let workspace = Workspace::Within { offset, len };
        let result = reservation.quantizer(workspace);
        assert!(
            matches!(result, Err(DeviceError::OutOfBounds { .. })),
            "{workspace:?}: {result:?}"
        );
    }
    drop((worker, quantizer, reservation, device));
    driver.clean_report("outside");
}
