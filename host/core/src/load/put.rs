//! Puts results into their places: kernels write them there where the processor can, otherwise into a
//! buffer that is then copied.

use super::LoadError;
use super::arena::Target;
use super::on_device::OnDevices;
use crate::device::{
    PageLocked, Piece, QuantizeJob, QuantizingWriter, Reservation, Staged, WRITER_BUFFERS, Writer,
};
use crate::plan::Plan;

/// Results lie in a buffer at multiples of this many bytes.
const ALIGNMENT: usize = 64;

/// What this may cost in a buffer with two results.
pub(super) const BUFFER_GAP: usize = ALIGNMENT;

/// One worker's writers, by device; none for those that the processor can write.
#[derive(Debug)]
pub(super) struct Writers {
    by_device: Vec<Option<DeviceWriter>>,
    buffer_bytes: usize,
}

#[derive(Debug)]
enum DeviceWriter {
    /// Carries results.
    Copies(Box<dyn Writer>),
    /// Carries what is to be quantized, too; to this place in the workspace.
    Quantizes {
        writer: Box<dyn QuantizingWriter>,
        source: u64,
    },
}

impl DeviceWriter {
    fn writer(&mut self) -> &mut dyn Writer {
        match self {
            DeviceWriter::Copies(writer) => &mut **writer,
            DeviceWriter::Quantizes { writer, .. } => &mut **writer,
        }
    }
}

/// How many buffers a worker needs for all of its writers.
pub(super) fn buffers(memory: &[Option<Box<dyn Reservation>>]) -> usize {
    let remote = memory
        .iter()
        .flatten()
        .filter(|memory| is_remote(&***memory));
    WRITER_BUFFERS * remote.count()
}

/// Whether the processor cannot write it.
pub(super) fn is_remote(memory: &dyn Reservation) -> bool {
    memory.host_memory().is_none() && !memory.is_empty()
}

/// What the writers of a load are made of.
pub(super) struct Transfers<'m> {
    /// Where the processor cannot write, in the order of the plan.
    pub(super) remote: Vec<Option<&'m dyn Reservation>>,
    pub(super) on_devices: &'m OnDevices,
    pub(super) buffer_bytes: usize,
}

impl Transfers<'_> {
    /// Takes the buffers of all workers at once. Gives each worker's, as far as it needs any.
    ///
    /// # Errors
    /// [`LoadError::Device`] when they are refused.
    pub(super) fn page_lock(
        &self,
        workers: usize,
    ) -> Result<Vec<Option<Box<dyn PageLocked>>>, LoadError> {
        let remote = self.remote.iter().flatten();
        let each = (WRITER_BUFFERS * self.buffer_bytes).saturating_mul(remote.clone().count());
        let mut all = match remote.clone().next() {
            None => None,
            Some(memory) => {
                let locked = memory.page_lock(each.saturating_mul(workers));
                locked.map_err(LoadError::Device)?
            }
        };
        let of_worker = |_| all.as_mut().map(|all| all.take(each));
        Ok((0..workers).map(of_worker).collect())
    }

    /// The writers of the worker with this number, with its buffers.
    ///
    /// # Errors
    /// [`LoadError::Device`] when the driver refuses, and [`LoadError::NoTransfer`] for memory that
    /// cannot be written at all.
    pub(super) fn writers(
        &self,
        plan: &Plan,
        worker: usize,
        mut buffers: Option<Box<dyn PageLocked>>,
    ) -> Result<Writers, LoadError> {
        let mut by_device = Vec::with_capacity(self.remote.len());
        for (index, (memory, plan)) in self.remote.iter().zip(&plan.devices).enumerate() {
            let Some(memory) = memory else {
                by_device.push(None);
                continue;
            };
            let buffers = buffers.as_mut();
            let buffers = buffers.map(|all| all.take(WRITER_BUFFERS * self.buffer_bytes));
            let writer = match (buffers, self.on_devices.get(index)) {
                (None, _) => Ok(None),
                (Some(buffers), Some(device)) => device.quantizer.worker(buffers).map(|writer| {
                    let source = device.source(worker);
                    Some(DeviceWriter::Quantizes { writer, source })
                }),
                (Some(buffers), None) => {
                    let writer = memory.writer(buffers);
                    writer.map(|writer| writer.map(DeviceWriter::Copies))
                }
            };
            let writer = writer.map_err(LoadError::Device)?;
            by_device.push(Some(writer.ok_or_else(|| LoadError::NoTransfer {
                device: plan.device.name.clone(),
            })?));
        }
        Ok(Writers {
            by_device,
            buffer_bytes: self.buffer_bytes,
        })
    }
}

impl Writers {
    /// The writer of a device that quantizes by itself.
    pub(super) fn quantizing(
        &mut self,
        device: usize,
    ) -> Result<&mut dyn QuantizingWriter, LoadError> {
        match self.by_device.get_mut(device) {
            Some(Some(DeviceWriter::Quantizes { writer, .. })) => Ok(&mut **writer),
            _ => Err(LoadError::Internal(
                "a device that does not quantize was asked to",
            )),
        }
    }

    /// Bytes that can be put into this place at once; `None` where that is not limited.
    pub(super) fn buffer_bytes(&self, target: &Target<'_>) -> Option<usize> {
        match target {
            Target::Host(_) => None,
            Target::Device { .. } => Some(self.buffer_bytes),
        }
    }

    /// Waits until everything has arrived.
    ///
    /// # Errors
    /// [`LoadError::Device`] when a copy has failed.
    pub(super) fn finish(&mut self) -> Result<(), LoadError> {
        for device_writer in self.by_device.iter_mut().flatten() {
            device_writer.writer().finish().map_err(LoadError::Device)?;
        }
        Ok(())
    }
}

/// Has `produce` fill places of one tensor. Where something must carry the bytes there, they may
/// arrive after this returns.
///
/// # Errors
/// Those of `produce`, [`LoadError::Device`], and [`LoadError::Internal`] for places that do not
/// belong together.
pub(super) fn put<const N: usize, T>(
    writers: &mut Writers,
    targets: [Target<'_>; N],
    produce: impl FnOnce([&mut [u8]; N]) -> Result<T, LoadError>,
) -> Result<T, LoadError> {
    let device = targets.iter().find_map(|target| match target {
        Target::Host(_) => None,
        Target::Device { device, .. } => Some(*device),
    });
    let mut places: [&mut [u8]; N] = std::array::from_fn(|_| <&mut [u8]>::default());
    let Some(device) = device else {
        for (place, target) in places.iter_mut().zip(targets) {
            if let Target::Host(bytes) = target {
                *place = bytes;
            }
        }
        return produce(places);
    };
    let device_writer = writers.by_device.get_mut(device).and_then(Option::as_mut);
    let device_writer = device_writer.ok_or(LoadError::Internal("a device has no writer"))?;
    let nothing = Piece {
        start: 0,
        len: 0,
        offset: 0,
    };
    let (mut pieces, mut scales) = ([nothing; N], None);
    let mut rest = device_writer.writer().stage().map_err(LoadError::Device)?;
    let mut start = 0;
    for ((place, piece), target) in places.iter_mut().zip(&mut pieces).zip(targets) {
        let (offset, len, in_workspace) = match target {
            Target::Device {
                device: same,
                offset,
                len,
                in_workspace,
            } if same == device => (offset, len, in_workspace),
            Target::Host([]) => (0, 0, false),
            _ => return Err(LoadError::Internal("parts of a tensor lie on two devices")),
        };
        let padded = len.next_multiple_of(ALIGNMENT).min(rest.len());
        let (first, others) = rest.split_at_mut(padded);
        *place = first
            .get_mut(..len)
            .ok_or(LoadError::Internal("a chunk is larger than its buffer"))?;
        match in_workspace {
            true => scales = Some(Piece { start, len, offset }),
            false => *piece = Piece { start, len, offset },
        }
        start += padded;
        rest = others;
    }
    let result = produce(places)?;
    let written = match (device_writer, &scales) {
        (device_writer, None) => device_writer.writer().write(&pieces),
        (DeviceWriter::Quantizes { writer, .. }, Some(scales)) => {
            writer.write_scaled(&pieces, scales)
        }
        (DeviceWriter::Copies(_), Some(_)) => {
            return Err(LoadError::Internal(
                "scales for a device that does not quantize",
            ));
        }
    };
    written.map_err(LoadError::Device)?;
    Ok(result)
}

/// Has `read` fill a buffer, and a device quantize it as `job` says; what and from where is filled in
/// here.
///
/// # Errors
/// Those of `read`, [`LoadError::Device`], and [`LoadError::Internal`] for a device that does not
/// quantize.
pub(super) fn put_to_quantize(
    writers: &mut Writers,
    device: usize,
    mut job: QuantizeJob,
    read: impl FnOnce(&mut [u8]) -> Result<Staged, LoadError>,
) -> Result<(), LoadError> {
    let device_writer = writers.by_device.get_mut(device);
    let Some(Some(DeviceWriter::Quantizes { writer, source })) = device_writer else {
        return Err(LoadError::Internal(
            "a device that does not quantize was asked to",
        ));
    };
    let buffer = writer.stage().map_err(LoadError::Device)?;
    job.staged = read(buffer)?;
    job.source = *source;
    writer.quantize(&job).map_err(LoadError::Device)
}

/// Scales where they are stored or staged: parts are aligned to 256 bytes, pieces of buffers too,
/// and scales are cut at whole ones.
pub(super) fn as_f32(bytes: &mut [u8]) -> &mut [f32] {
    bytemuck::cast_slice_mut(bytes)
}
