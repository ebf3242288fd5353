"""
What the fakes and the real things have in common: one table for each fake, which runs against both.

=================  ==========================================  ===================================================
table              against the fake                            against the real thing
=================  ==========================================  ===================================================
``hook_socket``    tests/unit/libvirt_hooks/test_hook_natd.py  same module: natd's own HookServer
``guest_agent``    tests/unit/qga_agent/test_agents.py         tests/e2e/test_fakes.py: qemu-ga in a booted guest
``libvirtd``       tests/unit/qga_agent/test_fake_libvirt.py   tests/e2e/test_fakes.py: a libvirtd of the lab
``kernel``         tests/unit/site/test_fake_kernel.py         tests/netns/test_fake_kernel.py: natd's Kernel
``traffic``        tests/unit/site/test_fake_traffic.py        tests/netns/test_fake_traffic.py: packets and conntrack
``agent_errors``   tests/unit/qga_agent/                       tests/e2e/test_fakes.py: libvirt's errors of agents
                   test_libvirt_connection.py
=================  ==========================================  ===================================================
"""
