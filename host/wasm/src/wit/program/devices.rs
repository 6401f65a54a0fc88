//! The interface `devices`.

use super::ProgramCtxView;
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

impl devices::Host for ProgramCtxView<'_> {
    fn get_devices(&mut self) -> wasmtime::Result<Vec<types::Device>> {
        let (context, _) = self.begin()?;
        let memory = &context.memory;
        let left = memory.quota() - memory.reserved().reserved.now.min(memory.quota());
        let infos = context.device_infos().into_iter();
        let devices = infos.map(|mut info| {
            info.available = info.available.min(left);
            convert::device(&info)
        });
        Ok(devices.collect())
    }

    fn get_usage(&mut self, device: u32) -> Result<devices::Usage, CallError> {
        let (context, _) = self.begin()?;
        let usage = context.memory.usage(device)?;
        Ok(devices::Usage {
            requested: gauge(usage.requested),
            padded: gauge(usage.padded),
            reserved: gauge(usage.reserved),
        })
    }

    fn get_quota(&mut self) -> wasmtime::Result<devices::Quota> {
        let (context, _) = self.begin()?;
        let memory = &context.memory;
        Ok(devices::Quota {
            limit: memory.quota(),
            reserved: gauge(memory.reserved().reserved),
        })
    }
}
