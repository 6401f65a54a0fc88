//! A device's queue, used by hand: what it gives, what it refuses, and what becomes of it when a call fails.

use std::sync::Arc;

use cuda_stand_in::control::{Setup, StandIn};
use tightfit::device::{
    AbsmaxMean, AbsmaxQuantization, AbsmaxRecovery, CudaDevice, Dequantization, Device,
    DeviceBytes, DeviceError, MatrixShape, Operation, Product, Quantization, Queue, QueuedProduct,
    QueuedScales, QueuedWeights, Reservation, Workspace,
};
use tightfit::memory::ReservationSize;
use tightfit_kernels::{
    BlockSize, DYNAMIC_MAP, FloatType, Isa, Kernels, LinearWeights, NESTED_BLOCK_SIZE, QuantType,
    Scales, blocks, packed_bytes,
};

use super::{Driver, MIB, stand_in};

const ELEMENTS: usize = 96 * 128;
const BLOCKS: usize = ELEMENTS / 64;
const NESTED: usize = BLOCKS.div_ceil(NESTED_BLOCK_SIZE);

struct Opened {
    // Dropped in this order: a queue keeps memory only as long as it works.
    queue: Arc<dyn Queue>,
    reservation: Box<dyn Reservation>,
    next: std::cell::Cell<u64>,
    _device: CudaDevice,
}

impl Opened {
    fn open(index: u32) -> Result<Opened, DeviceError> {
        let device = CudaDevice::open(index, None)?;
        let size = ReservationSize {
            requested: 4 * MIB,
            padded: 4 * MIB,
            reserved: 4 * MIB,
        };
        Ok(Opened {
            reservation: device.reserve(size)?,
            queue: device.queue()?.expect("a GPU has one"),
            next: std::cell::Cell::new(0),
            _device: device,
        })
    }

    /// Bytes of their own.
    fn take(&self, bytes: usize) -> Result<DeviceBytes, DeviceError> {
        let start = self.next.get();
        self.next.set((start + bytes as u64).next_multiple_of(256));
        let range = self.reservation.range(start, bytes as u64)?;
        Ok(range.expect("it is a GPU's"))
    }

    fn put(&self, bytes: &[u8]) -> Result<DeviceBytes, DeviceError> {
        let place = self.take(bytes.len())?;
        self.queue.write(&place, bytes)?;
        Ok(place)
    }

    fn get(&self, place: &DeviceBytes) -> Result<Vec<u8>, DeviceError> {
        let mut out = vec![0; place.bytes() as usize];
        self.queue.read(place, &mut out)?;
        Ok(out)
    }
}

fn numbers(count: usize, step: usize) -> Vec<f32> {
    (0..count)
        .map(|index| ((index * step) % 1009) as f32 / 500.0 - 1.0)
        .collect()
}

fn bytes_of(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
}

/// Quantizes twice over, recovers, dequantizes, multiplies, copies and clears, and reads all of it at the end.
fn everything() -> Result<Vec<Vec<u8>>, DeviceError> {
    let on = Opened::open(0)?;
    let queue = &on.queue;
    let source = on.put(&bytes_of(&numbers(ELEMENTS, 7919)))?;
    let codes = on.take(ELEMENTS / 2)?;
    let absmax = on.take(4 * BLOCKS)?;
    let nonfinite = on.take(8)?;
    queue.give(&Operation::Clear(nonfinite.clone()))?;
    queue.give(&Operation::Quantize(Quantization {
        float: FloatType::F32,
        block_size: BlockSize::DEFAULT,
        elements: ELEMENTS,
        source: source.clone(),
        codes: codes.clone(),
        absmax: absmax.clone(),
        nonfinite: nonfinite.clone(),
    }))?;
    let sums = on.take(AbsmaxMean::sums_bytes(BLOCKS) as usize)?;
    let mean = on.take(4)?;
    queue.give(&Operation::AbsmaxMean(AbsmaxMean {
        count: BLOCKS,
        absmax: absmax.clone(),
        sums,
        mean: mean.clone(),
    }))?;
    let (small, nested) = (on.take(BLOCKS)?, on.take(4 * NESTED)?);
    queue.give(&Operation::QuantizeAbsmax(AbsmaxQuantization {
        count: BLOCKS,
        absmax: absmax.clone(),
        mean: mean.clone(),
        codes: small.clone(),
        nested: nested.clone(),
    }))?;
    let recovered = on.take(4 * BLOCKS)?;
    queue.give(&Operation::DequantizeAbsmax(AbsmaxRecovery {
        count: BLOCKS,
        codes: small.clone(),
        nested: nested.clone(),
        mean: mean.clone(),
        absmax: recovered.clone(),
    }))?;
    let out = on.take(2 * ELEMENTS)?;
    queue.give(&Operation::Dequantize(Dequantization {
        quant_type: QuantType::Nf4,
        block_size: BlockSize::DEFAULT,
        elements: ELEMENTS,
        codes: codes.clone(),
        absmax: recovered.clone(),
        float: FloatType::Bf16,
        target: out.clone(),
    }))?;
    let copied = on.take(2 * ELEMENTS)?;
    queue.give(&Operation::Copy {
        source: out.clone(),
        target: copied.clone(),
    })?;
    let x = on.put(&bytes_of(&numbers(3 * 128, 31)))?;
    let y = on.take(3 * 96 * 4)?;
    let map = on.put(&bytes_of(&DYNAMIC_MAP))?;
    let product = Product {
        float: FloatType::F32,
        rows: 3,
        by_row: true,
        transposed: false,
    };
    queue.give(&Operation::Multiply(Box::new(QueuedProduct {
        weights: QueuedWeights {
            quant_type: QuantType::Nf4,
            shape: MatrixShape {
                experts: None,
                outputs: 96,
                inputs: 128,
                block_size: BlockSize::DEFAULT,
            },
            codes: codes.clone(),
            scales: QueuedScales::Double {
                codes: small.clone(),
                nested: nested.clone(),
                mean: mean.clone(),
                map,
            },
        },
        product,
        x,
        experts: None,
        bias: None,
        y: y.clone(),
        workspace: None,
    })))?;
    let read = [
        codes, absmax, nonfinite, mean, small, nested, recovered, out, copied, y,
    ];
    read.iter().map(|place| on.get(place)).collect()
}

/// The same by the processor; the product within a tolerance of its own.
fn by_the_processor() -> Vec<Vec<u8>> {
    let kernels = Kernels::new(Isa::Portable).unwrap();
    let source = bytes_of(&numbers(ELEMENTS, 7919));
    let mut codes = vec![0; packed_bytes(ELEMENTS)];
    let mut absmax = vec![0.0; blocks(ELEMENTS, BlockSize::DEFAULT)];
    let float = FloatType::F32;
    kernels
        .quantize_nf4(&source, float, BlockSize::DEFAULT, &mut codes, &mut absmax)
        .unwrap();
    let mean = kernels.absmax_mean(&absmax);
    let (mut small, mut nested) = (vec![0; BLOCKS], vec![0.0; NESTED]);
    kernels
        .quantize_absmax(&absmax, mean, &mut small, &mut nested)
        .unwrap();
    let mut recovered = vec![0.0; BLOCKS];
    kernels
        .dequantize_absmax(&small, &nested, mean, &mut recovered)
        .unwrap();
    let mut out = vec![0; 2 * ELEMENTS];
    let (nf4, size) = (QuantType::Nf4, BlockSize::DEFAULT);
    kernels
        .dequantize(
            nf4,
            &codes,
            &recovered,
            size,
            ELEMENTS,
            FloatType::Bf16,
            &mut out,
        )
        .unwrap();
    let weights = LinearWeights {
        quant_type: nf4,
        outputs: 96,
        inputs: 128,
        block_size: size,
        codes: &codes,
        scales: Scales::Absmax(&recovered),
    };
    let mut y = vec![0f32; 3 * 96];
    let one = std::num::NonZeroUsize::MIN;
    kernels
        .linear(&weights, 3, &numbers(3 * 128, 31), None, &mut y, one)
        .unwrap();
    vec![
        codes.clone(),
        bytes_of(&absmax),
        vec![0; 8],
        mean.to_le_bytes().to_vec(),
        small,
        bytes_of(&nested),
        bytes_of(&recovered),
        out.clone(),
        out,
        bytes_of(&y),
    ]
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let (floats, _) = bytes.as_chunks::<4>();
    floats.iter().copied().map(f32::from_le_bytes).collect()
}

#[test]
fn everything_is_done_in_order_and_as_the_processor_does_it() {
    let driver = Driver::start(1);
    let have = everything().unwrap();
    let need = by_the_processor();
    for (index, (have, need)) in have.iter().zip(&need).take(9).enumerate() {
        assert!(have == need, "result {index} differs");
    }
    for (have, need) in floats(&have[9]).iter().zip(floats(&need[9])) {
        assert!((have - need).abs() < 1e-4, "{have} {need}");
    }
    driver.clean_report("a queue");
}

#[test]
fn whichever_call_fails_it_is_an_error_and_nothing_is_left_or_wrong() {
    let one = || Setup {
        devices: vec![64 * MIB],
        ..Setup::default()
    };
    let Some(driver) = stand_in("a driver that fails", &one()) else {
        return;
    };
    let expected = everything().unwrap();
    let calls = driver.report().calls;
    drop(driver);
    for number in 1..=calls.len() as u64 {
        // Contexts that are entered and left are most of the calls.
        let is_common = calls[number as usize - 1].starts_with("cuCtx");
        if is_common && number % 7 != 0 {
            continue;
        }
        for for_good in [false, true] {
            let driver = StandIn::start(&Setup {
                fail_at: Some(number),
                for_good,
                ..one()
            });
            // A thread of its own: contexts that cannot be left stay with it.
            let result = std::thread::scope(|scope| scope.spawn(everything).join().unwrap());
            let report = driver.report();
            let call = &calls[number as usize - 1];
            let what = format!("{call}, call {number}, {for_good}");
            assert!(report.faults.is_empty(), "{what}: {:?}", report.faults);
            if !for_good {
                assert!(report.leaks.is_empty(), "{what}: {:?}", report.leaks);
            }
            if let Ok(result) = result {
                assert!(result == expected, "{what}: other bytes");
            }
        }
    }
}

#[test]
fn operands_that_do_not_belong_together_are_refused_and_nothing_is_given() {
    let Some(driver) = stand_in(
        "its books",
        &Setup {
            devices: vec![64 * MIB; 2],
            ..Setup::default()
        },
    ) else {
        return;
    };
    let (on, other) = (Opened::open(0).unwrap(), Opened::open(1).unwrap());
    let range = |on: &Opened, start, len| on.reservation.range(start, len).unwrap().unwrap();
    let copy = |source, target| on.queue.give(&Operation::Copy { source, target });
    let quantize = |source: DeviceBytes, codes: DeviceBytes| {
        on.queue.give(&Operation::Quantize(Quantization {
            float: FloatType::F32,
            block_size: BlockSize::DEFAULT,
            elements: 64,
            source,
            codes,
            absmax: range(&on, 4096, 4),
            nonfinite: range(&on, 8192, 8),
        }))
    };
    let refused = [
        ("overlap", copy(range(&on, 0, 64), range(&on, 32, 64))),
        ("need 64", copy(range(&on, 0, 64), range(&on, 64, 65))),
        (
            "another device",
            copy(range(&other, 0, 64), range(&on, 0, 64)),
        ),
        (
            "another device",
            copy(range(&on, 0, 64), range(&other, 0, 64)),
        ),
        (
            "multiple of 4",
            quantize(range(&on, 1, 256), range(&on, 512, 32)),
        ),
        ("need 32", quantize(range(&on, 0, 256), range(&on, 512, 31))),
        ("overlap", quantize(range(&on, 0, 256), range(&on, 255, 32))),
        (
            "overlap",
            quantize(range(&on, 0, 256), range(&on, 4095, 32)),
        ),
        ("for 3", on.queue.write(&range(&on, 0, 3), &[1; 4])),
        ("for 3", on.queue.read(&range(&on, 0, 3), &mut [1; 4])),
        (
            "another device",
            on.queue.write(&range(&other, 0, 3), &[1; 3]),
        ),
        (
            "another device",
            on.queue.read(&range(&other, 0, 3), &mut [1; 3]),
        ),
    ];
    for (expected, result) in refused {
        match result {
            Err(DeviceError::Operand { device, reason }) => {
                assert_eq!(device, "cuda:0");
                assert!(reason.contains(expected), "{reason}");
            }
            result => panic!("{expected}: {result:?}"),
        }
    }
    // Who makes ranges of an application's own may say anything: what lies outside is found out.
    let whole = range(&on, 0, 4 * MIB);
    let mut address = whole.address();
    address.pointer += 4 * MIB - 8;
    let lying = DeviceBytes::new(address, 64, Arc::clone(whole.memory()));
    let result = copy(lying, range(&on, 0, 64));
    assert!(
        matches!(result, Err(DeviceError::OutOfBounds { .. })),
        "{result:?}"
    );
    assert!(whole.slice(0, 4 * MIB + 1).is_none() && whole.slice(u64::MAX, 1).is_none());
    assert!(on.reservation.range(1, 4 * MIB).is_err());
    let cleared = on.reservation.cleared(Workspace::Beside { len: 64 });
    let cleared = cleared.unwrap().unwrap();
    copy(cleared, range(&on, 0, 64)).unwrap();
    assert_eq!(on.get(&range(&on, 0, 64)).unwrap(), [0; 64]);
    drop((on, other, whole));
    driver.report().is_clean("operands");
    let launches = driver.report().launches;
    assert!(launches.is_empty(), "{launches:?}");
}

#[test]
fn memory_that_is_given_up_is_kept_until_the_work_is_done() {
    let driver = Driver::start(1);
    let on = Opened::open(0).unwrap();
    let place = on.put(&[7; 4096]).unwrap();
    let Opened {
        queue,
        reservation,
        _device,
        ..
    } = on;
    drop((place, reservation));
    drop(_device);
    queue.finish().unwrap();
    drop(queue);
    driver.clean_report("memory that was given up");
}

/// A product of one row that can be given again and again, and how its launches begin.
struct Again<'a> {
    driver: &'a StandIn,
    on: &'a Opened,
    product: QueuedProduct,
}

impl Again<'_> {
    fn new<'a>(driver: &'a StandIn, on: &'a Opened) -> Again<'a> {
        let codes = on.put(&vec![0x5a; ELEMENTS / 2]).unwrap();
        let absmax = on.put(&bytes_of(&[1.0; BLOCKS])).unwrap();
        let product = QueuedProduct {
            weights: QueuedWeights {
                quant_type: QuantType::Nf4,
                shape: MatrixShape {
                    experts: None,
                    outputs: 96,
                    inputs: 128,
                    block_size: BlockSize::DEFAULT,
                },
                codes,
                scales: QueuedScales::Absmax(absmax),
            },
            product: Product {
                float: FloatType::F32,
                rows: 1,
                by_row: true,
                transposed: false,
            },
            x: on.put(&bytes_of(&numbers(128, 31))).unwrap(),
            experts: None,
            bias: None,
            y: on.take(96 * 4).unwrap(),
            workspace: None,
        };
        Again {
            driver,
            on,
            product,
        }
    }

    /// Gives it; whether it may begin before what was given before has ended.
    fn overlaps(&self) -> bool {
        let product = Operation::Multiply(Box::new(self.product.clone()));
        self.on.queue.give(&product).unwrap();
        let calls = self.driver.report().calls;
        let mut launches = calls.iter().rev().filter(|call| call.contains("Launch"));
        match &launches.next().unwrap()[..] {
            "cuLaunchKernelEx" => true,
            "cuLaunchKernel" => false,
            other => panic!("{other}"),
        }
    }

    fn finish(&self) {
        self.on.queue.finish().unwrap();
    }

    /// A part of some bytes.
    fn part(&self, of: &DeviceBytes, at: u64, bytes: u64) -> DeviceBytes {
        let reservation = &self.on.reservation;
        let first = reservation.range(0, 1).unwrap().unwrap().address();
        let start = of.address().pointer - first.pointer + at;
        reservation.range(start, bytes).unwrap().unwrap()
    }
}

#[test]
fn a_product_overlaps_unless_its_weight_may_still_be_written() {
    let one = Setup {
        devices: vec![64 * MIB],
        ..Setup::default()
    };
    let Some(driver) = stand_in("launches that overlap", &one) else {
        return;
    };
    let on = Opened::open(0).unwrap();
    let again = Again::new(&driver, &on);
    // Both have been written, and the work is not done.
    assert!(!again.overlaps());
    again.finish();
    assert!(again.overlaps());
    // What it reads once it has waited, and what it writes, may be written before.
    on.queue.write(&again.product.x, &[0; 512]).unwrap();
    assert!(again.overlaps());
    assert!(again.overlaps());
    // A part of its scales.
    let QueuedScales::Absmax(absmax) = &again.product.weights.scales else {
        unreachable!()
    };
    let clear = Operation::Clear(again.part(absmax, 512, 4));
    on.queue.give(&clear).unwrap();
    drop(clear);
    assert!(!again.overlaps() && !again.overlaps());
    again.finish();
    // Another product's result.
    let copy = Operation::Copy {
        source: again.product.y.clone(),
        target: again.part(&again.product.weights.codes, 1024, 96 * 4),
    };
    assert!(again.overlaps());
    on.queue.give(&copy).unwrap();
    drop(copy);
    assert!(!again.overlaps());
    // Of very many ranges none is told apart any more.
    again.finish();
    for _ in 0..100 {
        let place = on.take(256).unwrap();
        on.queue.write(&place, &[1; 256]).unwrap();
    }
    assert!(!again.overlaps());
    again.finish();
    assert!(again.overlaps());
    drop(again);
    drop(on);
    driver.report().is_clean("launches that overlap");
}

#[test]
fn with_a_driver_whose_graphs_cannot_have_it_nothing_overlaps() {
    let one = Setup {
        devices: vec![64 * MIB],
        version: 12_020,
        ..Setup::default()
    };
    let Some(driver) = stand_in("a driver of CUDA 12.2", &one) else {
        return;
    };
    let on = Opened::open(0).unwrap();
    let again = Again::new(&driver, &on);
    again.finish();
    assert!(!again.overlaps());
    drop(again);
    drop(on);
    driver.report().is_clean("a driver of CUDA 12.2");
}
