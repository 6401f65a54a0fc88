//! Puts results into their places: kernels write them there where the processor can, otherwise into a
//! buffer that is then copied.

use super::LoadError;
use super::arena::Target;
use super::on_device::OnDevices;
use crate::device::{
    Attached, DeviceError, PageLocked, Piece, QuantizeJob, QuantizingWriter, Reservation, Staged,
    WRITER_BUFFERS, Writer,
};
use crate::plan::Plan;

/// Results lie in a buffer at multiples of this many bytes.
const ALIGNMENT: usize = 64;

/// What this may cost in a buffer with two results.
pub(super) const BUFFER_GAP: usize = ALIGNMENT;

/// One worker's way to the devices whose memory the processor cannot write: to one at a time, because
/// all have the same buffers.
pub(super) struct Writers<'w, 'm> {
    transfers: &'w Transfers<'m>,
    plan: &'w Plan,
    worker: usize,
    /// Those that no writer has.
    buffers: Option<Box<dyn PageLocked>>,
    current: Option<Current<'m>>,
}

/// The device that a worker writes to.
struct Current<'m> {
    device: usize,
    writer: DeviceWriter,
    /// Dropped last.
    attached: Option<Box<dyn Attached + 'm>>,
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

    fn release(self) -> Result<Box<dyn PageLocked>, DeviceError> {
        match self {
            DeviceWriter::Copies(writer) => writer.release(),
            DeviceWriter::Quantizes { writer, .. } => writer.release(),
        }
    }
}

/// How many buffers a worker needs.
pub(super) fn buffers(memory: &[Option<Box<dyn Reservation>>]) -> usize {
    let mut memory = memory.iter().flatten();
    match memory.any(|memory| is_remote(&**memory)) {
        true => WRITER_BUFFERS,
        false => 0,
    }
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

impl<'m> Transfers<'m> {
    /// Takes the buffers of all workers at once. Gives each worker's, as far as it needs any.
    ///
    /// # Errors
    /// [`LoadError::Device`] when they are refused.
    pub(super) fn page_lock(
        &self,
        workers: usize,
    ) -> Result<Vec<Option<Box<dyn PageLocked>>>, LoadError> {
        let each = WRITER_BUFFERS * self.buffer_bytes;
        let mut all = match self.remote.iter().flatten().next() {
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
    pub(super) fn writers<'w>(
        &'w self,
        plan: &'w Plan,
        worker: usize,
        buffers: Option<Box<dyn PageLocked>>,
    ) -> Writers<'w, 'm> {
        Writers {
            transfers: self,
            plan,
            worker,
            buffers,
            current: None,
        }
    }
}

impl<'m> Writers<'_, 'm> {
    /// The writer of a device, which from now on is the worker's.
    ///
    /// # Errors
    /// [`LoadError::Device`] when the driver refuses, also what it was given for the device before, and
    /// [`LoadError::NoTransfer`] for memory that cannot be written at all.
    fn of(&mut self, device: usize) -> Result<&mut DeviceWriter, LoadError> {
        let current = match self.current.take() {
            Some(current) if current.device == device => current,
            Some(Current {
                writer, attached, ..
            }) => {
                self.buffers = Some(writer.release().map_err(LoadError::Device)?);
                // Before the thread is bound to another device: what is bound last is left first.
                drop(attached);
                self.open(device)?
            }
            None => self.open(device)?,
        };
        Ok(&mut self.current.insert(current).writer)
    }

    fn open(&mut self, device: usize) -> Result<Current<'m>, LoadError> {
        let Transfers {
            remote, on_devices, ..
        } = self.transfers;
        let memory = remote.get(device).copied().flatten();
        let memory = memory.ok_or(LoadError::Internal("a device has no writer"))?;
        // What the first worker's thread has for itself is the caller's, who may use the driver too.
        let attached = match self.worker {
            0 => Ok(None),
            _ => memory.attach(),
        };
        let attached = attached.map_err(LoadError::Device)?;
        let writer = match (self.buffers.take(), on_devices.get(device)) {
            (None, _) => Ok(None),
            (Some(buffers), Some(device)) => device.quantizer.worker(buffers).map(|writer| {
                let source = device.source(self.worker);
                Some(DeviceWriter::Quantizes { writer, source })
            }),
            (Some(buffers), None) => {
                let writer = memory.writer(buffers);
                writer.map(|writer| writer.map(DeviceWriter::Copies))
            }
        };
        let writer = writer.map_err(LoadError::Device)?;
        Ok(Current {
            device,
            writer: writer.ok_or_else(|| LoadError::NoTransfer {
                device: self.plan.devices[device].device.name.clone(),
            })?,
            attached,
        })
    }

    /// The writer of a device that quantizes by itself.
    ///
    /// # Errors
    /// As for any device, and [`LoadError::Internal`] for one that does not.
    pub(super) fn quantizing(
        &mut self,
        device: usize,
    ) -> Result<(&mut dyn QuantizingWriter, u64), LoadError> {
        match self.of(device)? {
            DeviceWriter::Quantizes { writer, source } => Ok((&mut **writer, *source)),
            DeviceWriter::Copies(_) => Err(LoadError::Internal(
                "a device that does not quantize was asked to",
            )),
        }
    }

    /// Waits until everything has arrived.
    ///
    /// # Errors
    /// [`LoadError::Device`] when a copy has failed.
    pub(super) fn finish(&mut self) -> Result<(), LoadError> {
        match &mut self.current {
            None => Ok(()),
            Some(current) => current.writer.writer().finish().map_err(LoadError::Device),
        }
    }
}

/// Has `produce` fill places of one tensor. Where something must carry the bytes there, they may
/// arrive after this returns.
///
/// # Errors
/// Those of `produce`, [`LoadError::Device`], and [`LoadError::Internal`] for places that do not
/// belong together.
pub(super) fn put<const N: usize, T>(
    writers: &mut Writers<'_, '_>,
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
    let device_writer = writers.of(device)?;
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
    writers: &mut Writers<'_, '_>,
    device: usize,
    mut job: QuantizeJob,
    read: impl FnOnce(&mut [u8]) -> Result<Staged, LoadError>,
) -> Result<(), LoadError> {
    let (writer, source) = writers.quantizing(device)?;
    let buffer = writer.stage().map_err(LoadError::Device)?;
    job.staged = read(buffer)?;
    job.source = source;
    writer.quantize(&job).map_err(LoadError::Device)
}

/// Scales where they are stored or staged: parts are aligned to 256 bytes, pieces of buffers too,
/// and scales are cut at whole ones.
pub(super) fn as_f32(bytes: &mut [u8]) -> &mut [f32] {
    bytemuck::cast_slice_mut(bytes)
}
