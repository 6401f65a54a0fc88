//! The library's errors as Python's exceptions.

use pyo3::prelude::*;
use pyo3::types::PyDict;
use tightfit::device::DeviceInfo;
use tightfit::status::Status;
use tightfit_cli::ErrorReport;

/// Why work did not succeed. Made without the interpreter's lock; [`Failure::raise`] needs it.
#[derive(Debug)]
pub(crate) struct Failure(Box<ErrorReport>);

impl Failure {
    /// A call that is wrong.
    pub(crate) fn usage(message: impl std::fmt::Display) -> Failure {
        Failure(Box::new(ErrorReport::new(Status::Usage, "usage", &message)))
    }

    /// A fault of ours.
    pub(crate) fn internal(message: impl std::fmt::Display) -> Failure {
        Failure(Box::new(ErrorReport::new(
            Status::Other,
            "internal",
            &message,
        )))
    }

    /// An error that is borrowed.
    pub(crate) fn from_report<'a, E>(error: &'a E) -> Failure
    where
        ErrorReport: From<&'a E>,
    {
        Failure(Box::new(ErrorReport::from(error)))
    }

    /// Says what there was, where a policy that refuses only says what is missing: of all devices together,
    /// and which that is where there is only one.
    pub(crate) fn on(mut self, devices: &[DeviceInfo]) -> Failure {
        let report = &mut self.0;
        if report.kind == "does-not-fit"
            && report.need_bytes.is_none()
            && let Some(missing) = report.missing_bytes
        {
            let available = devices.iter().map(|device| device.available);
            let have = available.fold(0, u64::saturating_add);
            report.have_bytes = Some(have);
            report.need_bytes = Some(have.saturating_add(missing));
            if let [device] = devices {
                report.device = Some(device.name.clone());
            }
        }
        self
    }

    /// The exception, whose class and fields `tightfit._errors` chooses.
    pub(crate) fn raise(&self, py: Python<'_>) -> PyErr {
        self.exception(py).unwrap_or_else(|error| error)
    }

    fn exception(&self, py: Python<'_>) -> PyResult<PyErr> {
        let report = &self.0;
        let fields = PyDict::new(py);
        fields.set_item("status", report.status)?;
        fields.set_item("guest", &report.guest)?;
        fields.set_item("device", &report.device)?;
        fields.set_item("tensor", &report.tensor)?;
        fields.set_item("setting", &report.setting)?;
        fields.set_item("path", &report.path)?;
        fields.set_item("limit", &report.limit)?;
        fields.set_item("need", report.need_bytes)?;
        fields.set_item("have", report.have_bytes)?;
        fields.set_item("missing", report.missing_bytes)?;
        let make = py.import("tightfit._errors")?.getattr("exception")?;
        let made = make.call1((report.kind, &report.message, fields))?;
        Ok(PyErr::from_value(made))
    }
}

impl<E> From<E> for Failure
where
    ErrorReport: for<'a> From<&'a E>,
{
    fn from(error: E) -> Failure {
        Failure(Box::new(ErrorReport::from(&error)))
    }
}
