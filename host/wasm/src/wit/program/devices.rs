//! The interface `devices`.

use super::ProgramContextView;
use super::bindings::tightfit::host::{devices, types};
use super::error::CallError;
use crate::wit::convert;
use tightfit::memory::Gauge;

fn gauge(gauge: Gauge) -> devices::Gauge {
    devices::Gauge {
        now: gauge.now,
        peak: gauge.peak,
    }
}

impl devices::Host for ProgramContextView<'_> {
    fn get_devices(&mut self) -> wasmtime::Result<Vec<types::Device>> {
        self.context.stop.check()?;
        let memory = &self.context.memory;
        let left = memory.quota() - memory.reserved().reserved.now.min(memory.quota());
        let infos = self.context.device_infos().into_iter();
        let devices = infos.map(|mut info| {
            info.available = info.available.min(left);
            convert::device(&info)
        });
        Ok(devices.collect())
    }

    fn get_usage(&mut self, device: u32) -> Result<devices::Usage, CallError> {
        self.context.stop.check()?;
        let usage = self.context.memory.usage(device)?;
        Ok(devices::Usage {
            requested: gauge(usage.requested),
            padded: gauge(usage.padded),
            reserved: gauge(usage.reserved),
        })
    }

    fn get_quota(&mut self) -> wasmtime::Result<devices::Quota> {
        self.context.stop.check()?;
        let memory = &self.context.memory;
        Ok(devices::Quota {
            limit: memory.quota(),
            reserved: gauge(memory.reserved().reserved),
        })
    }
}
